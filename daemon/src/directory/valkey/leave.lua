-- Removes a node's record, if it is of this start.
-- KEYS[1]  the nodes, as in heartbeat.lua
-- ARGV     id, edition (8 bytes); the start is all of it but the last two
local value = redis.call('HGET', KEYS[1], ARGV[1])
if value and string.sub(value, 9, 14) == string.sub(ARGV[2], 1, 6) then
  return redis.call('HDEL', KEYS[1], ARGV[1])
end
return 0
