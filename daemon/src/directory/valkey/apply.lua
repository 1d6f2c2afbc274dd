-- Carries out one batch of one node in one bucket, as a whole or not at all.
-- KEYS[1]  the bucket: a hash of  node (8 bytes) -> digest (72)  and  key (16 bytes) -> records (17 each)
-- ARGV     node (8), edition (8), sequence (8), changes (17 each: key 16, tiers 1); numbers are big-endian
-- Answers  the node's digest: edition, sequence, count, sum (8 bytes each), 40 zeros
--
-- Editions and sequences do not fit a double, and comparing strings follows the server's locale: halves are compared.
-- The zeros make a digest too long for the packed form that servers give small hashes, in which a look-up is a scan.
-- All that can fail is done before the first write, and that is the one write that may be refused for want of memory: a
-- script that has written may go on. HDEL is never refused, and so comes first where the bucket does not grow: a server
-- that is full takes what only removes or replaces entries.
local RECORD, DIGEST, MODULUS = 17, 72, 2 ^ 48
-- What a key takes beside its records, at least as much as it does: a few records are no room for another key.
local FIELD = 90
local ZEROS = string.rep('\0', DIGEST - 32)

local function above(a, b)
  local a_high, a_low = struct.unpack('>I4I4', a)
  local b_high, b_low = struct.unpack('>I4I4', b)
  return a_high > b_high or (a_high == b_high and a_low > b_low)
end

local function find(records, node)
  local from = 1
  while true do
    local at = string.find(records, node, from, true)
    if not at or (at - 1) % RECORD == 0 then return at end
    from = at + 1
  end
end

local function weight(key, tiers)
  return struct.unpack('<I5', key, 2) * (tiers + 1)
end

local function size(records)
  return #records > 0 and FIELD + #records or 0
end

local bucket, node, edition, sequence, changes = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local held = redis.call('HGET', bucket, node)
if held and #held ~= DIGEST then
  return redis.error_reply('KVTIERDATA a digest of ' .. #held .. ' bytes')
end
local known = held
if not held or above(edition, string.sub(held, 1, 8)) then
  held = edition .. string.rep('\0', DIGEST - 8)
end
if string.sub(held, 1, 8) ~= edition or not above(sequence, string.sub(held, 9, 16)) then
  if held ~= known then
    redis.call('HDEL', bucket, node)
    redis.call('HSET', bucket, node, held)
  end
  return held
end

local keys, values, growth = {}, {}, 0
for at = 1, #changes, RECORD do
  local key = string.sub(changes, at, at + 15)
  if not values[key] then
    values[key] = ''
    keys[#keys + 1] = key
  end
end
if #keys > 0 then
  local found = redis.call('HMGET', bucket, unpack(keys))
  for i, key in ipairs(keys) do
    values[key] = found[i] or ''
    if #values[key] % RECORD ~= 0 then
      return redis.error_reply('KVTIERDATA an entry of ' .. #values[key] .. ' bytes')
    end
    growth = growth - size(values[key])
  end
end

local count, sum = struct.unpack('>I8I8', held, 17)
for at = 1, #changes, RECORD do
  local key, tiers = string.sub(changes, at, at + 15), string.byte(changes, at + 16)
  local records = values[key]
  local place = find(records, node)
  if place then
    if string.sub(records, place + 8, place + 15) == edition then
      count = count - 1
      sum = (sum + MODULUS - weight(key, string.byte(records, place + 16))) % MODULUS
    end
    records = string.sub(records, 1, place - 1) .. string.sub(records, place + RECORD)
  end
  if tiers > 0 then
    count = count + 1
    sum = (sum + weight(key, tiers)) % MODULUS
    records = records .. node .. edition .. string.char(tiers)
  end
  values[key] = records
end

held = edition .. sequence .. struct.pack('>I8I8', count, sum) .. ZEROS
local set, gone = { node, held }, {}
for _, key in ipairs(keys) do
  growth = growth + size(values[key])
  if values[key] == '' then
    gone[#gone + 1] = key
  else
    set[#set + 1] = key
    set[#set + 1] = values[key]
  end
end
if growth > 0 then
  redis.call('HSET', bucket, unpack(set))
  if #gone > 0 then redis.call('HDEL', bucket, unpack(gone)) end
else
  if #gone == 0 then gone[1] = node end
  redis.call('HDEL', bucket, unpack(gone))
  redis.call('HSET', bucket, unpack(set))
end
return held
