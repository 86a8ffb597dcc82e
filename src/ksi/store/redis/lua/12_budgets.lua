-- Budgets: what runs has set aside, what was used, and who waits for room. The rules are those of `ksi.budgets`.
--
--   u:<place>     packed  a subject's figures in a window; a place is its beginning (20), the budget's name, \n, the subject
--   uses          ZSET    all places
--   bw:<line>     ZSET    rank + key of what waits for a budget; a line is its name, \n, and whom it counts for
--   lines_over    ZSET    lines for which somebody waits
--   ends_over     ZSET    end of a window + number of a conversation whose next request waits for it
--
-- What waits stands in the lane `ready:<route>\n\2`. A request keeps `demand`, what it may use at each provider, `reserved`,
-- what is set aside while it runs, and `late`, what was counted for each run whose daemon died: {attempt, hold}.
-- `caps` are {name, kind, named, unit, limit, start, end, refuse, warn_at, unpriced, raised}; `found` are what is over.

local budgets = {LEAST_OUTPUT = 1024, UNSAID_OUTPUT = 4096, LOOKS = 64, REFUSING_LOOKS = 1000, EXCEEDED = 1}

do  -- what stands here is theirs alone: Lua takes 200 locals in one block

local function bit_is_set(bits, place)
  return math.floor(bits / 2 ^ place) % 2 == 1
end

local function place_of(name, subject, start)
  return string.format('%020.0f', start) .. name .. '\n' .. subject
end

local FIGURES = {usd = 'nanos', tokens = 'tokens', requests = 'calls'}

local function figure(use, name)
  return use and tonumber(use[name] or 0) or 0
end

function budgets.subject(cap, facts, ask)
  local kind, named = cap[2], cap[3]
  if kind == 'all' then
    return 'all'
  end
  local name = kind == 'agent' and (facts.agent or '') or kind == 'token' and string.match(facts.agent or '', '^[^/]*')
    or kind == 'session' and facts.session or kind == 'provider' and ask[1] or ask[2]
  if named == '*' or named == name then
    return kind .. ':' .. name
  end
  local beginning = string.sub(named, -1) == '*' and string.sub(named, 1, -2)
  if beginning and string.sub(name, 1, #beginning) == beginning then
    return kind .. ':' .. named
  end
end

local function limit_of(cap, subject)
  return cap[5] + (cap[11] and cap[11][subject] or 0)
end

local function need(ask, cap, size, output)
  if cap[4] == 'requests' then
    return 1
  elseif cap[4] == 'tokens' then
    return size + output
  elseif not ask[6] then
    return math.ceil((size + output) * (cap[10] or 0))
  end
  return math.ceil(size * ask[6] + output * ask[7]) + ask[8]
end

local function output_within(ask, cap, size, left)
  if cap[4] == 'tokens' then
    return left - size
  elseif not ask[6] then
    local rate = cap[10] or 0
    return rate <= 0 and ask[4] or math.floor(left / rate) - size
  elseif ask[7] <= 0 then
    return ask[4]
  end
  return math.floor((left - ask[8] - 1 - size * ask[6]) / ask[7])
end

local function least_output(ask)
  return ask[5] and ask[4] or math.min(ask[4], budgets.LEAST_OUTPUT)
end

local function is_spent(over)
  return over.used + over.need > over.limit
end

local function is_never(over)
  return over.unpriced or over.need > over.limit
end

-- Whether `one` holds a call up for longer than `other`.
local function is_worse(one, other)
  local function marks(over)
    return {is_never(over) and 1 or 0, is_spent(over) and 1 or 0, over.refuse and 1 or 0, over.ends}
  end
  local mine, its = marks(one), marks(other)
  for at = 1, #mine do
    if mine[at] ~= its[at] then
      return mine[at] > its[at]
    end
  end
  return false
end

-- What to set aside for a call, or nil and why it does not fit.
function budgets.fit(ask, context, facts)
  local size, output, least = ask[3] + context, ask[4], least_output(ask)
  local over
  local shares = {}
  for at, cap in ipairs(A.caps) do
    local subject = budgets.subject(cap, facts, ask)
    if subject then
      local use = record('u:' .. place_of(cap[1], subject, cap[6]))
      local unit = FIGURES[cap[4]]
      local found = {cap = at, subject = subject, limit = limit_of(cap, subject), used = figure(use, unit),
        held = figure(use, 'held_' .. unit), need = 0, refuse = cap[8], ends = cap[7]}
      if cap[4] == 'usd' and not ask[6] and not cap[10] then
        found.unpriced = ask[2]
        return nil, found
      end
      found.need = need(ask, cap, size, least)
      if found.need > 0 and found.used + found.held + found.need > found.limit then
        over = (not over or is_worse(found, over)) and found or over
      elseif cap[4] ~= 'requests' and not over then
        output = math.max(least, math.min(output, output_within(ask, cap, size, found.limit - found.used - found.held)))
      end
      shares[#shares + 1] = {cap[1], subject, cap[6], cap[10] or 0}
    end
  end
  if over then
    return nil, over
  end
  return {size, output, ask[6] or false, ask[7], ask[8], shares, output < ask[4] and output or false}
end

-- So many tokens as calls, tokens and nanodollars of a share.
local function amount(hold, share, input, output)
  if not hold[3] then
    return {1, input + output, math.ceil((input + output) * share[4])}
  end
  return {1, input + output, math.ceil(input * hold[3] + output * hold[4]) + hold[5]}
end

local function held(hold, share)
  return amount(hold, share, hold[1], hold[2])
end

local NOTHING = {0, 0, 0}

-- What a call used, as a share counts it; `A.spent` is {tokens, nanos, output}, false where it is not known.
local function used(hold, share)
  local spent = A.spent
  if not spent then
    return NOTHING
  elseif not spent[1] then
    return amount(hold, share, hold[1], spent[3])
  end
  return {1, spent[1], spent[2] or math.ceil(spent[1] * share[4])}
end

local NAMES = {'calls', 'tokens', 'nanos'}

local function change(share, more_used, more_held)
  local place = place_of(share[1], share[2], share[3])
  local use = record('u:' .. place)
  if not use then
    use = new_record('u:' .. place)
    add('uses', place)
  end
  for at, name in ipairs(NAMES) do
    set(use, name, figure(use, name) + more_used[at])
    set(use, 'held_' .. name, figure(use, 'held_' .. name) + more_held[at])
  end
  return use
end

local function less(amounts)
  return {-amounts[1], -amounts[2], -amounts[3]}
end

-- -- who asks -----------------------------------------------------------------------------------------------------------

local function facts_of(rec)
  return {agent = rec.agent, session = conversation(rec.conversation).name}
end

local function rough(provider, model, size)
  return {provider, model, math.floor(size / BYTES_PER_TOKEN), budgets.UNSAID_OUTPUT, false, 0, 0, 0}
end

local function asks_of(rec)
  return rec.demand and cmsgpack.unpack(rec.demand) or {}
end

local function ask_at(asks, provider, model, size)
  for _, ask in ipairs(asks) do
    if ask[1] == provider then
      return ask
    end
  end
  return rough(provider, model, size)
end

-- Why a new request is not taken at any provider of its route; nil where it is, or waits.
function budgets.refusal(demand, facts, context)
  local first
  for _, ask in ipairs(demand or {}) do
    local hold, over = budgets.fit(ask, context, facts)
    if hold or not (is_never(over) or (is_spent(over) and over.refuse)) then
      return nil
    end
    first = first or over
  end
  return first
end

-- What to set aside for a request that is not in the store yet.
function budgets.room(demand, provider, model, size, facts, context)
  return budgets.fit(ask_at(demand or {}, provider, model, size), context, facts)
end

-- The same for one that is.
function budgets.look(rec, provider)
  local ask = ask_at(asks_of(rec), provider, rec.model or '', rec.demand and 0 or #passages.body(rec.key))
  return budgets.fit(ask, tonumber(conversation(rec.conversation).context) or 0, facts_of(rec))
end

-- -- steps --------------------------------------------------------------------------------------------------------------

function budgets.begin(rec, hold)
  set(rec, 'reserved', cmsgpack.pack(hold))
  for _, share in ipairs(hold[6]) do
    change(share, NOTHING, held(hold, share))
  end
end

local function notice(cap, subject, limit, amount_used, threshold)
  return {cap = cap, subject = subject, used = amount_used, limit = limit, threshold = threshold}
end

-- Note what is to be told of a place, each once for its limit.
local function tell_of(use, at, subject, notices, over_only)
  local cap = A.caps[at]
  local limit, amount_used = limit_of(cap, subject), figure(use, FIGURES[cap[4]])
  local before = figure(use, 'told_of') == limit and figure(use, 'told') or 0
  local after = before
  for place, share in ipairs(over_only and {} or cap[9]) do
    if amount_used >= share * limit and not bit_is_set(after, place) then
      after = after + 2 ^ place
      notices[#notices + 1] = notice(at, subject, limit, amount_used, share)
    end
  end
  if (over_only or amount_used >= limit) and not bit_is_set(after, 0) then
    after = after + budgets.EXCEEDED
    notices[#notices + 1] = notice(at, subject, limit, amount_used)
  end
  if after ~= before then
    set(use, 'told', after)
    set(use, 'told_of', limit)
  end
end

-- A request found a budget used up.
function budgets.exceeded(over, notices)
  if is_never(over) or not is_spent(over) then
    return
  end
  local cap = A.caps[over.cap]
  tell_of(change({cap[1], over.subject, cap[6]}, NOTHING, NOTHING), over.cap, over.subject, notices, true)
end

-- Set a conversation's next request aside until its budget has room.
function budgets.wait(rec, over)
  local conv, cap = conversation(rec.conversation), A.caps[over.cap]
  local entry, route = conv.ready, conv.ready_route
  local line, ends = cap[1] .. '\n' .. over.subject, pad20(cap[7])
  unready(conv)
  make_ready(conv, entry, route, OVER)
  set(conv, 'over_line', line)
  set(conv, 'over_end', ends)
  add('bw:' .. line, entry)
  add('lines_over', line)
  add('ends_over', ends .. conv.number)
end

local function bring_back(conv)
  local entry, route = conv.ready, conv.ready_route
  unready(conv)
  make_ready(conv, entry, route, home_of(conv, route))
end

local function bring_back_entry(entry)
  bring_back(conversation(request(string.sub(entry, 21)).conversation))
end

local function current_cap(share)
  for at, cap in ipairs(A.caps or {}) do
    if cap[1] == share[1] and cap[6] == share[3] then
      return at, cap
    end
  end
end

-- Let those go on for whom what is left now makes room, each by itself: one that is too large, or that another budget
-- stops, holds up nobody behind it; and those that wait no longer, as what was only reserved is used up now.
local function let_go_on(share, cap, use)
  local line, unit = share[1] .. '\n' .. share[2], FIGURES[cap[4]]
  local limit, used, held = limit_of(cap, share[2]), figure(use, unit), figure(use, 'held_' .. unit)
  local looks = cap[8] and budgets.REFUSING_LOOKS or budgets.LOOKS
  for _, entry in ipairs(look('ZRANGE', 'bw:' .. line, 0, looks - 1)) do
    local rec, least = request(string.sub(entry, 21))
    local asks = asks_of(rec)
    for _, ask in ipairs(asks[1] and asks or {rough('', '', 0)}) do
      local wanted = need(ask, cap, ask[3], least_output(ask))
      least = least and math.min(least, wanted) or wanted
    end
    if used + held + least <= limit or (cap[8] and (used + least > limit or held == 0)) then
      bring_back_entry(entry)
    end
  end
end

-- A call ended.
function budgets.settle(rec, notices)
  if not rec.reserved then
    return
  end
  local hold = cmsgpack.unpack(rec.reserved)
  set(rec, 'reserved', nil)
  local uses = {}
  for at, share in ipairs(hold[6]) do
    uses[at] = change(share, used(hold, share), less(held(hold, share)))
  end
  for at, share in ipairs(hold[6]) do
    local number, cap = current_cap(share)
    if cap then
      tell_of(uses[at], number, share[2], notices)
      if first('lines_over') then
        let_go_on(share, cap, uses[at])
      end
    end
  end
end

-- The daemon died under a call: nobody knows what it used, and all that was set aside counts.
function budgets.interrupted(rec)
  if not rec.reserved then
    return
  end
  local hold = cmsgpack.unpack(rec.reserved)
  for _, share in ipairs(hold[6]) do
    change(share, held(hold, share), less(held(hold, share)))
  end
  local late = rec.late and cmsgpack.unpack(rec.late) or {}
  late[#late + 1] = {tonumber(rec.attempt), hold}
  set(rec, 'late', cmsgpack.pack(late))
  set(rec, 'reserved', nil)
end

-- The report of such a call came after all.
function budgets.came_late(rec)
  local kept, its = {}, nil
  for _, late in ipairs(rec.late and A.spent and cmsgpack.unpack(rec.late) or {}) do
    if late[1] == A.number then
      its = late[2]
    else
      kept[#kept + 1] = late
    end
  end
  if not its then
    return
  end
  set(rec, 'late', kept[1] and cmsgpack.pack(kept) or nil)
  for _, share in ipairs(its[6]) do
    local counted, real = held(its, share), used(its, share)
    local use = change(share, {real[1] - counted[1], real[2] - counted[2], real[3] - counted[3]}, NOTHING)
    local _, cap = current_cap(share)
    if cap and first('lines_over') then
      let_go_on(share, cap, use)
    end
  end
end

-- Let those be taken again whose budget's window is over; how many.
function budgets.bring_back_ended(limit)
  local done = 0
  while done < limit do
    local entry = first('ends_over')
    if not entry or string.sub(entry, 1, 20) > A.wall then
      break
    end
    bring_back(conversation(string.sub(entry, 21)))
    done = done + 1
  end
  return done
end

-- Forget figures whose window began before a time.
function budgets.prune(before, limit)
  for _, place in ipairs(call('ZRANGEBYLEX', P .. 'uses', '-', '[' .. before .. ':', 'LIMIT', 0, limit)) do
    local use = record('u:' .. place)
    if figure(use, 'held_calls') == 0 then
      remove('uses', place)
      forget_record(use)
    end
  end
end

verb('reconsider', function()
  local done = 0
  for _, line in ipairs(call('ZRANGE', P .. 'lines_over', 0, -1)) do
    if not A.budget or string.sub(line, 1, #A.budget + 1) == A.budget .. '\n' then
      for _, entry in ipairs(call('ZRANGE', P .. 'bw:' .. line, 0, A.limit - done - 1)) do
        bring_back_entry(entry)
        done = done + 1
      end
    end
    if done >= A.limit then
      break
    end
  end
  return {count = done}
end)

read('budget_uses', function()
  local uses = {}
  for _, place in ipairs(direct('ZRANGEBYLEX', P .. 'uses', '[' .. A.since, '+')) do
    local rest = string.sub(place, 21)
    local at = string.find(rest, '\n', 1, true)
    if string.sub(rest, 1, at - 1) == A.budget then
      local use = record('u:' .. place)
      local numbers = {}
      for _, name in ipairs({'calls', 'tokens', 'nanos', 'held_calls', 'held_tokens', 'held_nanos', 'told', 'told_of'}) do
        numbers[#numbers + 1] = figure(use, name)
      end
      uses[#uses + 1] = {string.sub(rest, at + 1), tonumber(string.sub(place, 1, 20)), numbers}
    end
  end
  return {uses = uses}
end)

read('budget_waits', function()
  local waits = {}
  for _, line in ipairs(direct('ZRANGE', P .. 'lines_over', 0, A.limit - 1)) do
    local entries = direct('ZRANGE', P .. 'bw:' .. line, 0, 0)
    local conv = entries[1] and conversation(request(string.sub(entries[1], 21)).conversation)
    if conv then
      waits[#waits + 1] = {line, direct('ZCARD', P .. 'bw:' .. line), tonumber(conv.over_end)}
    end
  end
  return {waits = waits}
end)

end
