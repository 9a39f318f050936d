-- requeue: a gateway lets a request of its own run again, because the agent that held it is dead.
--
-- KEYS  1 request stream   2 reply list   3 inbound list   4 record, for a request with an Idempotency-Key
-- ARGV  1 group   2 entry id   3 the dead consumer   4 number of the new attempt
--       5 how the inbound list begins if nothing was taken from it; empty where nothing was sent
--       6… names and values of other fields that the new entry has otherwise (its signature)
--
-- outcome             when                                           what was done
-- requeued, entry id  the entry is pending, the dead one's, and      acked, deleted, added again with the same
--                     nothing lies on its reply list                 fields and the new attempt
-- answered            its reply list exists: bytes may have          nothing
--                     reached the client
-- taken               a part of what the client sent after it        nothing
--                     was taken by the dead one
-- lost                it is pending and another's                    nothing
-- finished            it is not pending (withdrawn, ended)           nothing
-- gone                the stream or its group does not exist         nothing
--
-- A new entry for each attempt: who owns an entry owns the attempt, and a thawed agent's late frames find
-- their entry gone. The record, if it is of the old entry, is of the new one from now on.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return {'gone'} end
  return pending
end
if #pending == 0 then return {'finished'} end
if pending[1][2] ~= ARGV[3] then return {'lost'} end
if redis.call('EXISTS', KEYS[2]) == 1 then return {'answered'} end
if ARGV[5] ~= '' and string.sub(redis.call('LINDEX', KEYS[3], 0) or '', 1, #ARGV[5]) ~= ARGV[5] then return {'taken'} end
local fields = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
if #fields == 0 then return {'finished'} end
redis.call('XDEL', KEYS[1], ARGV[2])
fields = fields[1][2]
local changed = {attempt = ARGV[4]}
for i = 6, #ARGV, 2 do changed[ARGV[i]] = ARGV[i + 1] end
for i = 1, #fields, 2 do fields[i + 1] = changed[fields[i]] or fields[i + 1] end
local added = redis.call('XADD', KEYS[1], '*', unpack(fields))
if KEYS[4] and redis.call('HGET', KEYS[4], 'entry') == ARGV[2] then redis.call('HSET', KEYS[4], 'entry', added) end
return {'requeued', added}
