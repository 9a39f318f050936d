-- The mounts in turn: /m0/hello to /m15/hello. The requests are made once, not for each send.
local requests, turn = {}, 0

function init(args)
  for mount = 0, 15 do
    requests[mount] = wrk.format("GET", "/m" .. mount .. "/hello")
  end
end

function request()
  turn = (turn + 1) % 16
  return requests[turn]
end
