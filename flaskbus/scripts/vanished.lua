-- vanished: which of these entries are not in the stream (any longer)?
--
-- KEYS  1 request stream
-- ARGV  entry ids
--
-- Returns the places (from 1) of those that are missing: they were finished and their reply lies on its list,
-- or the broker lost them (FLUSHALL, a failover, XDEL by hand).
local missing = {}
for place, id in ipairs(ARGV) do
  if #redis.call('XRANGE', KEYS[1], id, id) == 0 then missing[#missing + 1] = place end
end
return missing
