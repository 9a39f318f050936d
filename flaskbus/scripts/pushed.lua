-- pushed: the end of a transaction in which an agent has pushed large frames of a request that goes on.
--
-- KEYS  1 request stream   2 reply list
-- ARGV  1 group   2 entry id   3 consumer   4 list TTL in ms   5 doorbell channel   6 request id
--       7 how many frames were pushed
--
-- outcome    when                                          what was done
-- a number   the entry is pending and mine                 bell rung; the list's length now
-- lost       the entry is pending and another's            the frames were taken off again
-- finished   the entry is not pending (withdrawn, ended)   the frames were taken off again
-- gone       the stream or its group does not exist        the frames were taken off again
--
-- It says what push says. What passes through a script is copied several times: with 256 KiB push takes 440 µs, and RPUSH
-- with this 50.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if not pending.err and #pending > 0 and pending[1][2] == ARGV[3] then
  redis.call('PEXPIRE', KEYS[2], ARGV[4])
  redis.call('PUBLISH', ARGV[5], ARGV[6])
  return redis.call('LLEN', KEYS[2])
end
redis.call('LTRIM', KEYS[2], 0, -1 - ARGV[7])
if not pending.err then return #pending == 0 and 'finished' or 'lost' end
if string.find(pending.err, 'NOGROUP', 1, true) then return 'gone' end
return pending
