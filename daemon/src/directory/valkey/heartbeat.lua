-- Writes a node's record and answers with the records of all that live.
-- KEYS[1]  the nodes: a hash of  id -> until (8 bytes, big-endian milliseconds of the server's clock) and record;
--          the empty id's value is the format
-- ARGV     the format, id, life in milliseconds, record
local nodes, format, id, ttl, record = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local found = redis.call('HGET', nodes, '')
if found ~= format and (found or redis.call('EXISTS', nodes) == 1) then
  return redis.error_reply('KVTIERFORMAT ' .. (found or 'no format'))
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- A server that is full takes it all the same: HDEL is never refused, nor what follows it in a script (see apply.lua).
redis.call('HDEL', nodes, id)
redis.call('HSET', nodes, '', format, id, struct.pack('>I8', now + ttl) .. record)

local all, live, dead = redis.call('HGETALL', nodes), {}, {}
for i = 1, #all, 2 do
  local of, value = all[i], all[i + 1]
  if of ~= '' then
    if #value >= 8 and struct.unpack('>I8', value) > now then
      live[#live + 1] = string.sub(value, 9)
    else
      dead[#dead + 1] = of
    end
  end
end
for _, of in ipairs(dead) do redis.call('HDEL', nodes, of) end
return live
