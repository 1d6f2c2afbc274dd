-- Removes entries of one bucket, each only if it is still exactly the one given.
-- KEYS[1]  the bucket, as in apply.lua
-- ARGV[1]  entries (33 bytes each: key 16, record 17)
-- Answers  how many went
--
-- What still counts is taken out of its node's digest, so that a node given up too early finds out what it lost. A digest
-- that falls to nothing goes too: names that never come back leave nothing behind. HDEL comes first, for servers that are
-- full (see apply.lua).
local RECORD, ENTRY, DIGEST, MODULUS = 17, 33, 72, 2 ^ 48

local bucket, entries = KEYS[1], ARGV[1]
local values, digests, reaped = {}, {}, 0
for at = 1, #entries, ENTRY do
  local key, record = string.sub(entries, at, at + 15), string.sub(entries, at + 16, at + 32)
  local node, edition, tiers = string.sub(record, 1, 8), string.sub(record, 9, 16), string.byte(record, 17)
  local records = values[key] or redis.call('HGET', bucket, key) or ''
  for place = 1, #records - RECORD + 1, RECORD do
    if string.sub(records, place, place + RECORD - 1) == record then
      values[key] = string.sub(records, 1, place - 1) .. string.sub(records, place + RECORD)
      reaped = reaped + 1
      local held = digests[node] or redis.call('HGET', bucket, node) or ''
      if #held == DIGEST and string.sub(held, 1, 8) == edition then
        local count, sum = struct.unpack('>I8I8', held, 17)
        local weight = struct.unpack('<I5', key, 2) * (tiers + 1)
        sum = (sum + MODULUS - weight) % MODULUS
        digests[node] = string.sub(held, 1, 16) .. struct.pack('>I8I8', math.max(count - 1, 0), sum)
          .. string.sub(held, 33)
      end
      break
    end
  end
end

local set, gone = {}, {}
for key, records in pairs(values) do
  if records == '' then
    gone[#gone + 1] = key
  else
    set[#set + 1] = key
    set[#set + 1] = records
  end
end
for node, held in pairs(digests) do
  if struct.unpack('>I8', held, 17) == 0 then
    gone[#gone + 1] = node
  else
    set[#set + 1] = node
    set[#set + 1] = held
  end
end
if #gone == 0 then gone[1] = set[1] end
if #gone > 0 then redis.call('HDEL', bucket, unpack(gone)) end
if #set > 0 then redis.call('HSET', bucket, unpack(set)) end
return reaped
