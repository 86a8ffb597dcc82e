-- answer: what a person says to a request that asks.
--
-- ARGV[2]  request_id asked answered wall lock_expiry position_limit; due expires; state error message, where it ends
-- Answer   the fields of `Answered`

verb('answer', function()
  local key = call('GET', P .. 'id:' .. A.request_id)
  local rec = key and request(key)
  if not rec or rec.external then
    return {error = 'unknown'}
  end
  local map = {conversation = conversation(rec.conversation).name, taken = false}
  if rec.asks and rec.question == A.asked then
    map.taken = true
    become(rec, rec.state, function()
      set(rec, 'question', A.answered)
      set(rec, 'asks', nil)
      set(rec, 'expires', A.expires)
      if not A.state then
        set(rec, 'due', A.due)
      end
    end)
    if A.state then
      map.passing, map.injections = finish(rec, A.state, A.error, A.message)
    end
  end
  map.state = rec.state
  return map
end)
