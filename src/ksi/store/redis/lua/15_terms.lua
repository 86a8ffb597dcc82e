-- What all who take the same slots may begin together: probes, and calls and tokens in a minute.
--
--   probes:<slot>   SET     keys of calls that run while their provider is tried again
--   rate:<slot>     packed  what is left of `calls` and `tokens` of this minute, in units of 1/60,000,000, and as of when
--
-- An offer's fifth value is {probes, calls, tokens, known}, false where there is no limit; `known` is the version of the
-- provider's record by which the probes are sent. A bucket holds a minute's worth and
-- fills evenly; tokens may be overdrawn by what was not known before.

local terms = {MINUTE = 60000000}

function terms.level(slot, what, per_minute)
  local rate = record('rate:' .. slot)
  local most = per_minute * terms.MINUTE
  if not rate or not rate[what] then
    return most
  end
  local since = math.max(0, time() - tonumber(rate[what .. '_at']))
  return math.min(most, tonumber(rate[what]) + since * per_minute)
end

function terms.draw(slot, what, per_minute, amount)
  local left = terms.level(slot, what, per_minute) - amount * terms.MINUTE
  local rate = record('rate:' .. slot) or new_record('rate:' .. slot)
  set(rate, what, left)
  set(rate, what .. '_at', time())
end

-- Whether the caller knows the record that is kept: one that does not would probe what has just been left alone.
function terms.current(provider, known)
  local kept = call('HGET', P .. 'providers', provider)
  return (kept and tonumber(string.sub(kept, 1, 16)) or 0) == known
end

-- How many may begin now.
function terms.room(offer, slot)
  local probes, calls, tokens, known = unpack(offer[5])
  if probes and known and not terms.current(offer[2], known) then
    return 0
  end
  local room = probes and probes - size('probes:' .. slot) or math.huge
  if calls then
    room = math.min(room, math.floor(terms.level(slot, 'calls', calls) / terms.MINUTE))
  end
  if tokens and terms.level(slot, 'tokens', tokens) < terms.MINUTE then
    room = 0
  end
  return room
end

-- In how many microseconds a minute's limit lets one begin; 0 where it does now.
function terms.wait(offer, slot)
  local _, calls, tokens = unpack(offer[5])
  local wait = 0
  for what, per_minute in pairs({calls = calls or nil, tokens = tokens or nil}) do
    local missing = terms.MINUTE - terms.level(slot, what, per_minute)
    wait = math.max(wait, math.ceil(missing / per_minute))
  end
  return wait
end

-- A call begins. `rec` is in no index of running ones yet.
function terms.take(rec, offer)
  local probes, calls, tokens = unpack(offer[5])
  if probes then
    set(rec, 'probe', '1')
  end
  if calls then
    terms.draw(rec.slot, 'calls', calls, 1)
  end
  if tokens then
    local guess = math.floor(#passages.body(rec.key) / BYTES_PER_TOKEN)
    terms.draw(rec.slot, 'tokens', tokens, guess)
    set(rec, 'guess', guess)
    set(rec, 'tokens_per_minute', tokens)
  end
end

-- It ended and used so many tokens.
function terms.settle(rec, used)
  terms.draw(rec.slot, 'tokens', tonumber(rec.tokens_per_minute), used - tonumber(rec.guess))
end
