-- look: what a gateway wants to know of a mount's queue, each second.
--
-- KEYS  1 request stream
-- ARGV  1 group
--
-- outcome                            when                         what it holds
-- length, pending, {{consumer, n}…}  nobody waits                 n requests with each consumer; nothing is done
-- the same, added, last id, head id  somebody waits               entries ever added, newest id ever given, and the
--                                                                 first entry that nobody has taken
-- gone                               the stream or its group      nothing
--                                    does not exist
--
-- The group's own `lag` cannot be used: it is null as soon as an entry was deleted.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1])
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return 'gone' end
  return pending
end
local length = redis.call('XLEN', KEYS[1])
local found = {length, pending[1], pending[4] or {}}
if length <= pending[1] then return found end
local function facts(flat)
  local named = {}
  for i = 1, #flat, 2 do named[flat[i]] = flat[i + 1] end
  return named
end
local delivered
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = facts(flat)
  if group['name'] == ARGV[1] then delivered = group['last-delivered-id'] end
end
local head = redis.call('XRANGE', KEYS[1], '(' .. delivered, '+', 'COUNT', 1)
if #head == 0 then return found end
local stream = facts(redis.call('XINFO', 'STREAM', KEYS[1]))
found[4], found[5], found[6] = stream['entries-added'], stream['last-generated-id'], head[1][1]
return found
