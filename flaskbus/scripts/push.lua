-- push: an agent sends frames of a request that goes on; the first of them is its head.
--
-- KEYS  1 request stream   2 reply list
-- ARGV  1 group   2 entry id   3 consumer   4 list TTL in ms   5 doorbell channel   6 request id
--       7 largest frame that the doorbell carries   8… frames
--
-- outcome    when                                          what was done
-- a number   the entry is pending and mine                 frames pushed, bell rung; the list's length now
-- lost       the entry is pending and another's            nothing
-- finished   the entry is not pending (withdrawn, ended)   nothing
-- gone       the stream or its group does not exist        nothing
-- full       the broker is out of memory, and frames that  nothing
--            were pushed before still lie on the list
--
-- What has been taken makes room: frames for an empty list pass while the broker is out of memory, because a script
-- that has written may go on. A stream then keeps its client's pace, one push at a time.
-- From the first head on, bytes may have reached the client: the entry stays pending, and whoever would run
-- it again sees the reply list (or has already read it).
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return 'gone' end
  return pending
end
if #pending == 0 then return 'finished' end
if pending[1][2] ~= ARGV[3] then return 'lost' end
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('DEL', KEYS[2]) end
local length = redis.pcall('RPUSH', KEYS[2], unpack(ARGV, 8))
if type(length) == 'table' then
  if string.find(length.err, 'OOM', 1, true) then return 'full' end
  return length
end
redis.call('PEXPIRE', KEYS[2], ARGV[4])
local ring = ARGV[6]
if #ARGV == 8 and #ARGV[8] <= tonumber(ARGV[7]) then ring = ring .. ' ' .. ARGV[8] end
redis.call('PUBLISH', ARGV[5], ring)
return length
