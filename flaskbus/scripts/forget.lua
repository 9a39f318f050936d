-- forget: a gateway removes a mount that nobody has renewed for its whole TTL.
--
-- KEYS  1 owner hash   2 agents hash   3 request stream
--
-- outcome   when                                        what was done
-- kept      the owner hash exists, or entries wait      nothing
-- gone      neither                                     agents hash and stream deleted
if redis.call('EXISTS', KEYS[1]) == 1 or redis.call('XLEN', KEYS[3]) > 0 then return 'kept' end
redis.call('DEL', KEYS[2], KEYS[3])
return 'gone'
