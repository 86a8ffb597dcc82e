-- settle: end an attempt: state, answer, usage, head and the lock's release in one step.
--
-- ARGV[2]  key fence token; verdict (finish, retry, give_back) with state error message, or at route parked error message;
--          caps, spent (see 12_budgets.lua), context: tokens of the turn and all before it
--          number, ended, session, node, fork, provider, size, answer; tokens text_tokens; aftermath
-- ARGV[3]  the attempt     ARGV[4]  the attempt for the account, without its text
-- ARGV[5]  the texts of reminders in its prompt; then the bytes of the aftermath
-- Answer   the fields of `Settled`

-- Keep what a late run brought, unless its own end is there already: usage counts once.
local function keep_fenced(rec)
  local number = string.format('%08.0f', A.number)
  if rec.at_once and A.number == 1 then
    return
  end
  for _, entry in ipairs(call('LRANGE', P .. 'a:' .. rec.key, 0, -1)) do
    if string.sub(entry, 2, 9) == number and string.sub(entry, 1, 1) ~= 'I' then
      return
    end
  end
  account(rec, trail_entry('F', A.number, ARGS[3]), A.ended, 'F', ARGS[4])
end

-- Make a provider session a name of this conversation; false where it names another already.
local function bind(conv)
  if not A.session then
    return true
  end
  local owner = text('name:' .. A.session)
  if not owner then
    put_text('name:' .. A.session, conv.number)
    direct('SADD', P .. 'cx:' .. conv.number, A.session)
  end
  return not owner or owner == conv.number
end

local function fork_seen(conv, rec, session)
  if not A.fork or not session then
    return nil
  end
  local follows = A.fork == 'new_session' or A.fork == 'node_lost'
  local parent = follows and conv.head_session or conv.name
  return record_fork(conv, parent, session, rec.id, A.fork)
end

-- Make a completed attempt the conversation's head.
local function add_turn(conv, rec, bound)
  local number = key16(next_number('turn'))
  local agent = rec.agent or ''
  local header = (conv.head or NONE) .. rec.key .. conv.number .. string.format('%012.0f%012.0f', A.size, A.answer)
  header = header .. (bound and 'B' or 'U') .. string.format('%06d%08d', #agent, #ARGS[5])
  put_text('t:' .. number, header .. agent .. ARGS[5] .. ARGS[3])
  add('log:' .. R.daemon, number)
  local session = bound and A.session or nil
  set(conv, 'turns', tonumber(conv.turns) + 1)
  set(conv, 'context', A.context)
  conv.head, conv.logger, conv.provider, conv.session, conv.head_session = number, R.daemon, A.provider, session, session
  conv.node, conv.keeper = session and A.node, session and A.node and A.provider
  rec.turn, rec.logger, rec.provider = number, R.daemon, A.provider
  dirty[rec] = true
  return bare(number)
end

local function put_off(conv, rec)
  local route = A.route or rec.route
  note_route(route)
  local held = conv.holder == rec.key
  local let = held and rec.hold == '0' and not A.asks
  become(rec, A.parked and 'parked' or 'retrying', function()
    set(rec, 'due', A.at)
    set(rec, 'failed_at', tonumber(A.ended))
    set(rec, 'route', route)
    set(rec, 'error', A.error)
    set(rec, 'message', A.message)
    set(rec, 'question', A.question)
    set(rec, 'asks', A.asks and '1' or nil)
    if let then
      let_go(conv)
    end
  end)
  if let then
    return pass_on(rec)
  end
end

verb('settle', function()
  local rec = request(A.key)
  if not rec then
    return {error = 'not_kept'}
  end
  if rec.state ~= 'running' or tonumber(rec.fence) ~= A.fence or rec.token ~= A.token then
    keep_fenced(rec)
    budgets.came_late(rec)
    return {state = rec.state, fenced = true}
  end
  if A.aftermath and A.verdict == 'finish' and not rec.chain then
    return {error = 'no_chain'}
  end
  local verdict, state, err, message = A.verdict, A.state, A.error, A.message
  if rec.cancelling and verdict ~= 'finish' then
    verdict, state, err, message = 'finish', 'cancelled', 'cancelled', nil
  end
  local conv = conversation(rec.conversation)
  local map = {notices = {}}
  budgets.settle(rec, map.notices)
  local kind = A.interrupted and 'I' or 'O'
  local completed = verdict == 'finish' and state == 'completed'
  set(conv, 'active', A.wall)
  if completed then
    local bound = bind(conv)
    map.fork = fork_seen(conv, rec, bound and A.session)
    map.turn = add_turn(conv, rec, bound)
    if A.number == 1 then
      set(rec, 'at_once', '1')
    end
    account(rec, A.number > 1 and trail_entry('T', A.number, ''), A.ended, bound and 'B' or 'U', ARGS[4])
  else
    account(rec, trail_entry(kind, A.number, ARGS[3]), A.ended, 'B', ARGS[4])
  end
  charge(rec, A.tokens, A.text_tokens)
  if rec.guess and A.tokens then
    terms.settle(rec, A.tokens)
  end
  if verdict == 'finish' then
    local reminders
    if completed then
      reminders = use_reminders(rec)
    else
      put_reminders_back(rec, conv)
    end
    -- Before the lock passes on: a follow-up may be the next in this line.
    local aftermath = A.verdict == 'finish' and A.aftermath
    local sent = aftermath and write_aftermath(rec, aftermath) or {}
    local carries
    map.passing, carries = finish(rec, state, err, message, nil, aftermath and true)
    map.injections = {}
    for _, rows in ipairs({carries or {}, reminders or {}, sent}) do
      for _, row in ipairs(rows) do
        table.insert(map.injections, row)
      end
    end
    map.finished_at = tonumber(A.wall)
  elseif verdict == 'retry' then
    put_reminders_back(rec, conv)
    map.passing = put_off(conv, rec)
    map.due = bare(rec.due)
  else
    put_reminders_back(rec, conv)
    become(rec, 'queued')
    refresh(conv)
  end
  map.state = rec.state
  return map
end)
