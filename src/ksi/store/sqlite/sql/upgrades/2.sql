-- From layout 1 to 2: chains, deliveries, and what requests, conversations and turns know of them.

ALTER TABLE conversation ADD COLUMN reminders INTEGER NOT NULL DEFAULT 0;
ALTER TABLE request ADD COLUMN chain INTEGER;
ALTER TABLE request ADD COLUMN reminded INTEGER NOT NULL DEFAULT 0;
ALTER TABLE body ADD COLUMN reminders TEXT;

CREATE TABLE chain (
    id             INTEGER PRIMARY KEY,
    name           TEXT NOT NULL UNIQUE,    -- its root's request_id
    created_at     INTEGER NOT NULL,
    started_at     INTEGER NOT NULL,        -- its time begins here: with its root, or at the last reset
    max_depth      INTEGER NOT NULL,        -- this and the next two: its root's limits
    token_budget   INTEGER NOT NULL,
    time_window    INTEGER NOT NULL,
    used           INTEGER NOT NULL,        -- tokens since the last reset
    estimated      INTEGER NOT NULL,        -- of `used`
    reserved       INTEGER NOT NULL DEFAULT 0,
    members        INTEGER NOT NULL DEFAULT 0,
    unfinished     INTEGER NOT NULL DEFAULT 0,
    deepest        INTEGER NOT NULL DEFAULT 0,
    closed         INTEGER NOT NULL DEFAULT 0,
    tripped        TEXT,                    -- a Block as JSON
    guard_messages INTEGER NOT NULL DEFAULT 0,
    resets         INTEGER NOT NULL DEFAULT 0,
    reset_key      INTEGER NOT NULL DEFAULT 0   -- members up to this key came before the last reset
);

CREATE TABLE member (
    request      INTEGER PRIMARY KEY,       -- request.key
    chain        INTEGER NOT NULL,
    parent       TEXT,                      -- a request_id
    parent_key   INTEGER,
    depth        INTEGER NOT NULL,
    max_depth    INTEGER NOT NULL,          -- this and the next two: the minimum over itself and its ancestors
    token_budget INTEGER NOT NULL,
    time_window  INTEGER NOT NULL,
    estimate     INTEGER NOT NULL,          -- input tokens
    output_cap   INTEGER,                   -- NULL: it was in no chain when it came in
    guard        INTEGER NOT NULL,
    routing      INTEGER NOT NULL,          -- see ksi.store.admission.Routing
    reserved     INTEGER NOT NULL DEFAULT 0,
    tokens       INTEGER NOT NULL DEFAULT 0,
    estimated    INTEGER NOT NULL DEFAULT 0,    -- 1: some of `tokens` is an estimate
    carries      INTEGER NOT NULL DEFAULT 0,    -- 1: it carries the delivery of its own name
    mark         BLOB,
    result       BLOB,
    block        TEXT                       -- a Block as JSON
);
CREATE INDEX members_of ON member (chain, request);
CREATE INDEX unrouted ON member (request) WHERE routing = 2;

CREATE TABLE injection (
    id           INTEGER PRIMARY KEY,       -- grows with creation
    name         TEXT NOT NULL UNIQUE,
    chain        TEXT NOT NULL,             -- this and the next one by name: they may be gone before it
    parent       TEXT NOT NULL,
    parent_key   INTEGER NOT NULL,
    target       TEXT NOT NULL,
    direct       INTEGER NOT NULL,
    trigger      TEXT NOT NULL,
    state        INTEGER NOT NULL,          -- see ksi.store.sqlite.chain_rows.INJECTION_STATES
    created_at   INTEGER NOT NULL,
    finished_at  INTEGER,
    conversation INTEGER,                   -- of a reminder that waits: conversation.id
    carrier      INTEGER,                   -- of a reminder that was taken: request.key
    request_id   TEXT,                      -- who carries or carried it
    reason       TEXT,                      -- a Block as JSON
    text         TEXT NOT NULL,
    child        BLOB                       -- a ChildRequest as MessagePack, of a direct one that is not delivered
);
CREATE INDEX injections_in ON injection (state, id);
CREATE INDEX reminders_for ON injection (conversation, id) WHERE conversation IS NOT NULL;
CREATE INDEX reminders_in ON injection (carrier, id) WHERE state = 1;
CREATE INDEX injections_ended ON injection (finished_at) WHERE finished_at IS NOT NULL;
