-- withdraw: take a request back, and learn for certain whether it can have run.
--
-- KEYS  1 request stream
-- ARGV  1 group   2 entry id
--
-- outcome       when                                       what was done
-- undelivered   the group and the entry exist, not pending entry deleted: the app has not run and never will
-- delivered     the entry is pending                       acked, deleted: the app may have run
-- finished      the group exists, the entry does not       nothing: a reply may lie on its list
-- gone          the stream or its group does not exist     nothing
--
-- This is the only source of `executed: "no"` for a request that was sent.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return 'gone' end
  return pending
end
if #pending > 0 then
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
  redis.call('XDEL', KEYS[1], ARGV[2])
  return 'delivered'
end
if redis.call('XDEL', KEYS[1], ARGV[2]) == 1 then return 'undelivered' end
return 'finished'
