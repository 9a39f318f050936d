-- finish: an agent ends a request that it ran.
--
-- KEYS  1 request stream   2 reply list
-- ARGV  1 group   2 entry id   3 consumer   4 list TTL in ms   5 doorbell channel   6 request id
--       7 largest frame that the doorbell carries   8… the last frames
--
-- outcome    when                                          what was done
-- done       the entry is pending and mine                 acked, deleted, frames pushed, bell rung
-- lost       the entry is pending and another's            nothing
-- finished   the entry is not pending (withdrawn, ended)   nothing
-- gone       the stream or its group does not exist        nothing
--
-- XACK alone would work for a consumer that does not own the entry. Freeing comes before RPUSH, because
-- a script that has written already may go on when the broker is out of memory.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return 'gone' end
  return pending
end
if #pending == 0 then return 'finished' end
if pending[1][2] ~= ARGV[3] then return 'lost' end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
redis.call('RPUSH', KEYS[2], unpack(ARGV, 8))
redis.call('PEXPIRE', KEYS[2], ARGV[4])
local ring = ARGV[6]
if #ARGV == 8 and #ARGV[8] <= tonumber(ARGV[7]) then ring = ring .. ' ' .. ARGV[8] end
redis.call('PUBLISH', ARGV[5], ring)
return 'done'
