-- took: an agent has received inbound frames of a request that it runs, and there is room for more.
--
-- KEYS  1 request stream   2 inbound list
-- ARGV  1 group   2 entry id   3 consumer   4 doorbell channel   5 doorbell message   6 how many frames
--       7 how the first of them begins, its number included
--
-- outcome    when                                          what was done
-- done       the entry is pending and mine                 these frames removed, bell rung
-- lost       the entry is pending and another's            nothing
-- finished   the entry is not pending (withdrawn, ended)   nothing
-- gone       the stream or its group does not exist        nothing
--
-- Where another frame is the first, they were removed before, and the answer to that was lost.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return 'gone' end
  return pending
end
if #pending == 0 then return 'finished' end
if pending[1][2] ~= ARGV[3] then return 'lost' end
if ARGV[6] ~= '0' then
  local first = redis.call('LINDEX', KEYS[2], 0)
  if first and string.sub(first, 1, #ARGV[7]) == ARGV[7] then redis.call('LTRIM', KEYS[2], ARGV[6], -1) end
end
redis.call('PUBLISH', ARGV[4], ARGV[5])
return 'done'
