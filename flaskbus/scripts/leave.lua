-- leave: remove an agent from its mount's registry and from the group.
--
-- KEYS  1 agents hash   2 request stream
-- ARGV  1 group   2 agent id
--
-- outcome      when                                  what was done
-- left         it had nothing pending                record and consumer removed
-- pending, n   it still holds n requests             record removed; the consumer stays, because DELCONSUMER
--                                                    would forget what it holds
-- left         the stream or its group is gone       record removed
redis.call('HDEL', KEYS[1], ARGV[2])
local pending = redis.pcall('XPENDING', KEYS[2], ARGV[1], '-', '+', 1000, ARGV[2])
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return {'left', 0} end
  return pending
end
if #pending > 0 then return {'pending', #pending} end
redis.call('XGROUP', 'DELCONSUMER', KEYS[2], ARGV[1], ARGV[2])
return {'left', 0}
