-- vanished: which of these entries are not there (any longer)?
--
-- KEYS  1 request stream
-- ARGV  1 group   2 bytes that may be copied   3… entry ids
--
-- an entry is   when                                  how that is found
-- there         it is pending: an agent can end it    XPENDING, which copies no body
-- there         it waits in the stream                XRANGE, which copies all of it
-- missing       neither                               nothing is copied
-- not asked     as many bytes as allowed were copied  those that are behind it in the list
--
-- Returns the places (from 1) of those that are missing: they were finished and their reply lies on its list,
-- or the broker lost them (FLUSHALL, a failover, XDEL by hand of what waits).
local missing, left = {}, tonumber(ARGV[2])
for place = 3, #ARGV do
  local id = ARGV[place]
  local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if pending.err or #pending == 0 then
    if left <= 0 then break end
    local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
    if entry then
      for _, part in ipairs(entry[2]) do left = left - #part end
    else
      missing[#missing + 1] = place - 2
    end
  end
end
return missing
