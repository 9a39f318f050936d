#!lua flags=allow-oom
-- claim: an agent registers on its mount, and renews that with every heartbeat.
--
-- KEYS  1 owner hash   2 agents hash   3 request stream
-- ARGV  1 app name   2 '1' to take the mount over   3 mount TTL in ms   4 group   5 agent id   6 its record
--       7 '1' if the agent is ready to serve   8 '1' if it was not when it last claimed
--       9… the mount's own settings, fields and values
--
-- outcome             when                                        what was done
-- claimed             nobody owned the mount, or no agent of its  owner and record written, TTL set
--                     owner was ever ready, or it was replaced
-- renewed             the app owns it already                     record written, TTL renewed
-- taken, app name     another app owns it                         record renewed, if the agent has one: it may
--                                                                 still be running what it read before
--
-- The mount's own settings are those of the agent that was the latest to become ready; as long as none was, those of
-- the latest to claim. Agents that disagree (a rolling restart) do not change them with each heartbeat.
--
-- A heartbeat is written while the broker is out of memory too: else every agent would seem dead after a lease.
--
-- The group is created only together with its stream. Where a stream has lost its group, entries may lie in
-- it that already ran: only a gateway may mend that (it answers them first).
local owner, proven = unpack(redis.call('HMGET', KEYS[1], 'name', 'proven'))
if owner and proven and owner ~= ARGV[1] and ARGV[2] ~= '1' then
  if redis.call('HEXISTS', KEYS[2], ARGV[5]) == 1 then redis.call('HSET', KEYS[2], ARGV[5], ARGV[6]) end
  return {'taken', owner}
end
if owner ~= ARGV[1] then proven = false end
if not proven or ARGV[8] == '1' then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'name', ARGV[1], unpack(ARGV, 9))
  if proven then redis.call('HSET', KEYS[1], 'proven', '1') end
end
if ARGV[7] == '1' or ARGV[2] == '1' then redis.call('HSET', KEYS[1], 'proven', '1') end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('HSET', KEYS[2], ARGV[5], ARGV[6])
if redis.call('EXISTS', KEYS[3]) == 0 then
  redis.call('XGROUP', 'CREATE', KEYS[3], ARGV[4], '0', 'MKSTREAM')
end
if owner == ARGV[1] then return {'renewed', owner} end
return {'claimed', ARGV[1]}
