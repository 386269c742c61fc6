-- The ledger. docs/ledger.md says what a row's hash covers. Amounts are 16 bytes, the most significant first; times are
-- milliseconds since 1970. 'ledger_rows' and 'ledger_head' are the truth; everything else is derived from the rows.

CREATE TABLE ledger_rows (
    seq BIGINT NOT NULL PRIMARY KEY,
    at_ms BIGINT NOT NULL,
    idempotency TEXT NOT NULL UNIQUE,
    body TEXT NOT NULL,
    hash BLOB NOT NULL
);

-- One row: the last row of the journal, and the last that sealed an epoch.
CREATE TABLE ledger_head (
    one BIGINT NOT NULL PRIMARY KEY CHECK (one = 1),
    seq BIGINT NOT NULL,
    hash BLOB NOT NULL,
    epoch BIGINT NOT NULL,
    epoch_row BIGINT NOT NULL
);
INSERT INTO ledger_head (one, seq, hash, epoch, epoch_row) VALUES (1, 0, zeroblob(32), 0, 0);

CREATE TABLE ledger_balances (
    account TEXT NOT NULL,
    asset TEXT NOT NULL,
    credits BLOB NOT NULL,
    debits BLOB NOT NULL,
    PRIMARY KEY (account, asset)
) WITHOUT ROWID;

-- Which rows move money of an account.
CREATE TABLE ledger_entries (
    account TEXT NOT NULL,
    seq BIGINT NOT NULL,
    PRIMARY KEY (account, seq)
) WITHOUT ROWID;

-- What each application may spend in a day (NULL: what it has), has spent and reserved on 'day', and has open.
CREATE TABLE ledger_applications (
    application TEXT NOT NULL,
    asset TEXT NOT NULL,
    per_day BLOB,
    day BIGINT NOT NULL,
    used BLOB NOT NULL,
    opened BIGINT NOT NULL,
    PRIMARY KEY (application, asset)
) WITHOUT ROWID;

-- Reservations that are neither posted nor void.
CREATE TABLE ledger_open (
    name TEXT NOT NULL PRIMARY KEY,
    seq BIGINT NOT NULL,
    at_ms BIGINT NOT NULL
) WITHOUT ROWID;
CREATE INDEX ledger_open_by_age ON ledger_open (at_ms);

-- Receipts whose contributors are not known.
CREATE TABLE ledger_held (
    receipt TEXT NOT NULL PRIMARY KEY,
    asset TEXT NOT NULL,
    amount BLOB NOT NULL,
    at_ms BIGINT NOT NULL
) WITHOUT ROWID;
CREATE INDEX ledger_held_by_age ON ledger_held (at_ms);

-- The row that set what holds now. Splits hold for all assets and have an empty one.
CREATE TABLE ledger_terms (
    kind TEXT NOT NULL,
    target TEXT NOT NULL,
    asset TEXT NOT NULL,
    seq BIGINT NOT NULL,
    PRIMARY KEY (target, kind, asset)
) WITHOUT ROWID;

CREATE TABLE ledger_addresses (
    account TEXT NOT NULL PRIMARY KEY,
    address BLOB NOT NULL
) WITHOUT ROWID;

-- What each address was owed in all epochs up to one, where the epoch changed it.
CREATE TABLE ledger_leaves (
    address BLOB NOT NULL,
    asset TEXT NOT NULL,
    epoch BIGINT NOT NULL,
    cumulative BLOB NOT NULL,
    PRIMARY KEY (address, asset, epoch)
) WITHOUT ROWID;

-- The sum of the leaves.
CREATE TABLE ledger_totals (
    asset TEXT NOT NULL PRIMARY KEY,
    cumulative BLOB NOT NULL
) WITHOUT ROWID;
