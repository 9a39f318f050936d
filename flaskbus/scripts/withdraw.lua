-- withdraw: take a request back, and learn for certain whether it can have run.
--
-- KEYS  1 request stream   2 record, for a request with an Idempotency-Key
-- ARGV  1 group   2 entry id
--
-- outcome       when                                       what was done
-- undelivered   the group and the entry exist, not pending entry deleted: the app has not run and never will
-- delivered     the entry is pending                       acked, deleted: the app may have run
-- finished      the group exists, the entry does not       nothing: a reply may lie on its list
-- gone          the stream or its group does not exist     nothing
--
-- The record of an entry that was never delivered is deleted with it. Otherwise it learns which agent had the
-- entry: as long as that is registered it may still answer (see finish), and nothing runs under this key.
--
-- This is the only source of `executed: "no"` for a request that was sent.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return 'gone' end
  return pending
end
local delivered = #pending > 0
if delivered then redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) end
if redis.call('XDEL', KEYS[1], ARGV[2]) == 0 and not delivered then return 'finished' end
if KEYS[2] and redis.call('HGET', KEYS[2], 'entry') == ARGV[2] then
  if delivered then
    redis.call('HSET', KEYS[2], 'agent', pending[1][2])
  else
    redis.call('DEL', KEYS[2])
  end
end
return delivered and 'delivered' or 'undelivered'
