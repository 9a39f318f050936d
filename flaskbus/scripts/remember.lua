-- remember: a gateway sends a request with an Idempotency-Key, unless that key was used before.
--
-- KEYS  1 request stream   2 record   3 agents hash
-- ARGV  1 request id   2 fingerprint of the body   3 life of the record in ms   4… fields and values of the entry
--
-- outcome                       when                                            what was done
-- sent, entry id                there is no record; or its request was          entry added, record written
--                               withdrawn from an agent that is not
--                               registered any more
-- missing                       the stream does not exist                       nothing
-- mismatch                      the record is of another body                   nothing
-- running                       its request waits or runs                       nothing
-- answered, frame, request id   it ran; its answer, and the id it was sent as   nothing
-- unkept                        it ran, and its answer was not kept             nothing
--
-- Entry and record are written in one step: neither is without the other, whatever dies. The record is of one
-- entry: what an older run of the request has to say is not kept.
local id, fingerprint, state, reply, agent =
  unpack(redis.call('HMGET', KEYS[2], 'id', 'fingerprint', 'state', 'reply', 'agent'))
if state then
  if fingerprint ~= ARGV[2] then return {'mismatch'} end
  if state == 'answered' then return {state, reply, id} end
  if state ~= 'running' then return {state} end
  if not agent or redis.call('HEXISTS', KEYS[3], agent) == 1 then return {'running'} end
end
local added = redis.call('XADD', KEYS[1], 'NOMKSTREAM', '*', unpack(ARGV, 4))
if not added then return {'missing'} end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], 'id', ARGV[1], 'entry', added, 'fingerprint', ARGV[2], 'state', 'running')
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return {'sent', added}
