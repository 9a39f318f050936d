-- bury: an agent gives up on an entry that it cannot read, a gateway on one that keeps killing its agents.
--
-- KEYS  1 request stream   2 dead-letter stream   3 reply list   4 record, for a request with an Idempotency-Key,
--       which is deleted: a repeat begins anew
-- ARGV  1 group   2 entry id   3 consumer   4 life of the dead letters in ms   5 how many are kept
--       6 list TTL in ms   7 doorbell channel, or empty   8 request id   9 last frame   10… fields of the letter,
--       of which there are few (flaskbus/letters.py): unpack() can take some thousands
--
-- outcome    when                                          what was done
-- done       the entry is pending and mine                 acked, deleted, letter written, older letters whose
--                                                          life is over removed; if there is a channel: frame
--                                                          pushed, bell rung
-- lost       the entry is pending and another's            nothing
-- finished   the entry is not pending (withdrawn, ended)   nothing
-- gone       the stream or its group does not exist        nothing
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return 'gone' end
  return pending
end
if #pending == 0 then return 'finished' end
if pending[1][2] ~= ARGV[3] then return 'lost' end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
if KEYS[4] and redis.call('HGET', KEYS[4], 'entry') == ARGV[2] then redis.call('DEL', KEYS[4]) end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', unpack(ARGV, 10))
-- The stream lives on with each letter, and a letter no longer than it would alone.
local now = redis.call('TIME')
redis.call('XTRIM', KEYS[2], 'MINID', string.format('%.0f', now[1] * 1000 - ARGV[4]))
redis.call('PEXPIRE', KEYS[2], ARGV[4])
if ARGV[7] ~= '' then
  redis.call('RPUSH', KEYS[3], ARGV[9])
  redis.call('PEXPIRE', KEYS[3], ARGV[6])
  redis.call('PUBLISH', ARGV[7], ARGV[8])
end
return 'done'
