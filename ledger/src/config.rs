use openlora_types::InvalidField;
use serde::{Deserialize, Serialize};

/// How the ledger is run. Every list and loop has its bound here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LedgerConfig {
    /// Seconds after which a reservation that was neither posted nor voided is voided by a sweep.
    pub reservation_age_s: u64,
    /// Seconds after which contributors' parts whose share table has not come go to the pool.
    pub unattributed_after_s: u64,
    /// Reservations of one application and asset open at once.
    pub open_reservations_max: u64,
    /// Contributors in one share table.
    pub shares_max: usize,
    /// Parent adapters of one request.
    pub parents_max: usize,
    /// Assets that prices are set in.
    pub assets_max: u64,
    /// Rows a listing returns at most.
    pub page_rows_max: usize,
    /// Accounts that one row of a seal pays.
    pub payout_accounts_max: usize,
    /// Operations that are written at once; as many more wait in order, and further callers until there is room.
    pub writes_max: usize,
    /// Rows that one sweep writes at most.
    pub sweep_rows_max: usize,
}

impl Default for LedgerConfig {
    fn default() -> Self {
        Self {
            reservation_age_s: 3_600,
            unattributed_after_s: 7 * 24 * 3_600,
            open_reservations_max: 4_096,
            shares_max: 4_096,
            parents_max: 16,
            assets_max: 64,
            page_rows_max: 1_000,
            payout_accounts_max: 1_000,
            writes_max: 256,
            sweep_rows_max: 1_000,
        }
    }
}

impl LedgerConfig {
    pub(crate) fn check(&self) -> Result<(), InvalidField> {
        let bounds = [
            ("ledger.page_rows_max", self.page_rows_max, 100_000),
            ("ledger.payout_accounts_max", self.payout_accounts_max, 5_000),
            ("ledger.writes_max", self.writes_max, 10_000),
            ("ledger.sweep_rows_max", self.sweep_rows_max, 100_000),
        ];
        match bounds.into_iter().find(|&(_, value, max)| value == 0 || value > max) {
            Some((field, value, max)) => Err(InvalidField::new(field, format!("is {value} and must be 1 to {max}"))),
            None => Ok(()),
        }
    }
}
