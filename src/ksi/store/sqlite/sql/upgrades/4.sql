-- From layout 3 to 4: what is known of providers outlives the daemon.

CREATE TABLE provider_record (
    name    TEXT PRIMARY KEY,
    version INTEGER NOT NULL,               -- grows with each change
    value   BLOB NOT NULL                   -- see ksi.completion.pool.record
) WITHOUT ROWID;
