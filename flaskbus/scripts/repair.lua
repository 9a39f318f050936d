#!lua flags=allow-oom
-- repair: a gateway mends a request stream that has lost its group (XGROUP DESTROY, a failover, a restore).
--
-- KEYS  1 request stream   2 owner hash, where the mount was seen to be claimed
-- ARGV  1 group   2 entries to look at, at most
--
-- outcome                     when                                   what was done
-- left, {}                    nobody claims the mount any more       nothing
-- whole, {}                   the group exists                       nothing
-- mended, {}                  there is no stream, or it is empty     group created from the beginning
-- doubtful, {entry, …}        entries lie in it, and some may have   those entries deleted; to be answered
--                             run before the group was lost          `unknown`; call again until `mended`
--
-- While the broker is out of memory too: the group costs little, and without it nothing is ever freed.
-- Recreating the group over surviving entries would deliver each of them a second time.
if KEYS[2] and redis.call('EXISTS', KEYS[2]) == 0 then return {'left', {}} end
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if not groups.err then
  for _, group in ipairs(groups) do
    for i = 1, #group, 2 do
      if group[i] == 'name' and group[i + 1] == ARGV[1] then return {'whole', {}} end
    end
  end
  local entries = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', ARGV[2])
  if #entries > 0 then
    for _, entry in ipairs(entries) do redis.call('XDEL', KEYS[1], entry[1]) end
    return {'doubtful', entries}
  end
end
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
return {'mended', {}}
