#!lua flags=allow-oom
-- enlist: a mount in the set of mounts, or a gateway in the hash of gateways, which is its heartbeat too.
--
-- KEYS  1 set of mounts, or hash of gateways
-- ARGV  1 the mount's name, or the gateway's process   2 the gateway's record
--
-- outcome   when                          what was done
-- enlisted  always                        added to the set, or written into the hash
--
-- A broker that is out of memory lets it pass: else everybody would seem dead after a lease.
if #ARGV == 1 then redis.call('SADD', KEYS[1], ARGV[1]) else redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
return 'enlisted'
