-- Who this state belongs to, and how often it was opened.
CREATE TABLE identity (cluster TEXT NOT NULL, generation INTEGER NOT NULL) STRICT;
INSERT INTO identity VALUES (lower(hex(randomblob(16))), 0);

CREATE TABLE jobs (
  name TEXT PRIMARY KEY,
  state TEXT NOT NULL,
  submitted_unix_ms INTEGER NOT NULL,
  request TEXT NOT NULL,
  spec_json TEXT NOT NULL,
  record_json TEXT NOT NULL
) STRICT;

CREATE TABLE attempts (
  job TEXT NOT NULL,
  attempt INTEGER NOT NULL,
  began_unix_ms INTEGER NOT NULL,
  ended_unix_ms INTEGER NOT NULL,
  state TEXT NOT NULL,
  step INTEGER NOT NULL,
  cause TEXT NOT NULL,
  kind TEXT NOT NULL,
  PRIMARY KEY (job, attempt)
) STRICT;

-- What happened, in order; the tables above follow from it.
CREATE TABLE events (
  job TEXT NOT NULL,
  sequence INTEGER NOT NULL,
  unix_ms INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  kind TEXT NOT NULL,
  -- tunefleet.v1.JobEvent
  event BLOB NOT NULL,
  PRIMARY KEY (job, sequence)
) STRICT, WITHOUT ROWID;

CREATE TABLE workers (
  name TEXT PRIMARY KEY,
  journal TEXT NOT NULL,
  acknowledged INTEGER NOT NULL,
  draining INTEGER NOT NULL,
  -- tunefleet.v1.Register
  register BLOB NOT NULL,
  seen_unix_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE audit (
  unix_ms INTEGER NOT NULL,
  actor TEXT NOT NULL,
  peer TEXT NOT NULL,
  action TEXT NOT NULL,
  target TEXT NOT NULL,
  refused TEXT NOT NULL
) STRICT;
CREATE INDEX audit_by_time ON audit (unix_ms);
