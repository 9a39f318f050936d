-- finish: an agent ends a request that it ran.
--
-- KEYS  1 request stream   2 reply list
-- ARGV  1 group   2 entry id   3 consumer   4 list TTL in ms   5 doorbell channel   6 request id
--       7 largest frame that the doorbell carries   8… the last frames
-- For a request with an Idempotency-Key also
-- KEYS  3 its record
-- ARGV  8 life of the record in ms   9 what becomes of it: answered, unkept or released   10… the last frames
--
-- outcome    when                                          what was done
-- done       the entry is pending and mine                 acked, deleted, frames pushed, bell rung
-- lost       the entry is pending and another's            nothing
-- finished   the entry is not pending (withdrawn, ended)   nothing
-- gone       the stream or its group does not exist        nothing
--
-- XACK alone would work for a consumer that does not own the entry. Freeing comes before RPUSH, because
-- a script that has written already may go on when the broker is out of memory.
--
-- record      when                                          what was done
-- answered    it is of this entry and not settled yet,      the frame kept as the first answer
-- unkept      and the outcome is not `lost`                 that it ran, and its answer was not kept
-- released                                                  deleted: the request did not run
--
-- Also where the entry was withdrawn meanwhile: its client is gone, and may come again. A requeued request's
-- record is of the new entry, so that a thawed agent's late answer is not kept.
local outcome, first = 'done', 8
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if pending.err then
  if not string.find(pending.err, 'NOGROUP', 1, true) then return pending end
  outcome = 'gone'
elseif #pending == 0 then
  outcome = 'finished'
elseif pending[1][2] ~= ARGV[3] then
  return 'lost'
else
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
  redis.call('XDEL', KEYS[1], ARGV[2])
end
if KEYS[3] then
  first = 10
  local entry, state = unpack(redis.call('HMGET', KEYS[3], 'entry', 'state'))
  if entry == ARGV[2] and state == 'running' then
    if ARGV[9] == 'released' then
      redis.call('DEL', KEYS[3])
    else
      redis.call('PEXPIRE', KEYS[3], ARGV[8])
      redis.call('HSET', KEYS[3], 'state', ARGV[9])
      if ARGV[9] == 'answered' then redis.call('HSET', KEYS[3], 'reply', ARGV[10]) end
    end
  end
end
if outcome ~= 'done' then return outcome end
redis.call('RPUSH', KEYS[2], unpack(ARGV, first))
redis.call('PEXPIRE', KEYS[2], ARGV[4])
local ring = ARGV[6]
if #ARGV == first and #ARGV[first] <= tonumber(ARGV[7]) then ring = ring .. ' ' .. ARGV[first] end
redis.call('PUBLISH', ARGV[5], ring)
return 'done'
