//! What a transaction offers per unit of gas, and what it can cost at most (EIP-1559, and the data fee of OP-stack chains).

use alloy::primitives::{Address, U256, address};

/// Where OP-stack chains keep what posting a transaction's bytes to their Layer-1 costs.
pub const GAS_PRICE_ORACLE: Address = address!("0x420000000000000000000000000000000000000F");

/// The least rise that nodes take for the same nonce is 10% or 12.5%, of both fees: an eighth.
const BUMP_DIVISOR: u128 = 8;

/// Offers of a transaction, in wei per gas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fees {
    /// All that is paid at most.
    pub max_fee: u128,
    /// What of it goes to the block's producer.
    pub tip: u128,
}

/// What a block takes now, in wei per gas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Market {
    /// Burnt; rises by an eighth per full block.
    pub base_fee: u128,
    /// What the node advises for the producer.
    pub tip: u128,
}

impl Market {
    /// The least that gets into the next block.
    #[must_use]
    pub fn needed(&self) -> u128 {
        self.base_fee.saturating_add(self.tip)
    }

    /// An offer that holds while the base fee doubles (six full blocks), `cap` at most.
    ///
    /// # Errors
    /// [`AboveCap`] where not even the next block can be had.
    pub fn offer(&self, cap: u128) -> Result<Fees, AboveCap> {
        let max_fee = self.base_fee.saturating_mul(2).saturating_add(self.tip).min(cap);
        if self.needed() > cap {
            Err(AboveCap { needed: self.needed(), cap })
        } else {
            Ok(Fees { max_fee, tip: self.tip })
        }
    }
}

/// Gas costs more than the operator pays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("gas at {} gwei is above the {} gwei of max_fee_per_gas; waiting for it to fall", gwei(*needed), gwei(*cap))]
pub struct AboveCap {
    /// Wei per gas.
    pub needed: u128,
    /// Wei per gas.
    pub cap: u128,
}

/// Wei as gwei for people, to three digits.
fn gwei(wei: u128) -> f64 {
    (wei / 1_000_000) as f64 / 1_000.0
}

impl Fees {
    /// An offer that takes this one's place: the market's, and at least an eighth above this one.
    ///
    /// # Errors
    /// [`AboveCap`] where it would be above `cap`.
    pub fn replaced(&self, market: &Market, cap: u128) -> Result<Self, AboveCap> {
        let raised = |fee: u128| fee.saturating_add(fee / BUMP_DIVISOR).saturating_add(1);
        let (least, wanted) = (raised(self.max_fee), market.offer(cap)?);
        let tip = wanted.tip.max(raised(self.tip));
        let max_fee = wanted.max_fee.max(least).max(tip);
        if max_fee > cap { Err(AboveCap { needed: max_fee, cap }) } else { Ok(Self { max_fee, tip }) }
    }

    /// The most that `gas` can cost, with `data_fee` wei for its bytes.
    #[must_use]
    pub fn cost_max(&self, gas: u64, data_fee: U256) -> U256 {
        data_fee.saturating_add(U256::from(self.max_fee).saturating_mul(U256::from(gas)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GWEI: u128 = 1_000_000_000;

    #[test]
    fn an_offer_leaves_room_for_the_base_fee_and_stays_under_the_cap() {
        let market = Market { base_fee: 10 * GWEI, tip: GWEI };
        assert_eq!(market.offer(100 * GWEI), Ok(Fees { max_fee: 21 * GWEI, tip: GWEI }));
        assert_eq!(market.offer(15 * GWEI), Ok(Fees { max_fee: 15 * GWEI, tip: GWEI }));
        assert_eq!(market.offer(11 * GWEI), Ok(Fees { max_fee: 11 * GWEI, tip: GWEI }));
        let error = market.offer(11 * GWEI - 1).expect_err("above the cap");
        assert_eq!(error, AboveCap { needed: 11 * GWEI, cap: 11 * GWEI - 1 });
        assert!(error.to_string().contains("11 gwei"), "{error}");
    }

    #[test]
    fn a_replacement_raises_both_fees_by_an_eighth_and_no_further_than_the_cap() {
        let calm = Market { base_fee: 0, tip: 0 };
        for (max_fee, tip) in [(0, 0), (1, 1), (7, 3), (GWEI, GWEI), (21 * GWEI, 1), (u128::MAX / 3, GWEI)] {
            let old = Fees { max_fee, tip };
            let new = old.replaced(&calm, u128::MAX).expect("no cap");
            assert!(new.tip <= new.max_fee, "{new:?}");
            for (old, new) in [(old.max_fee, new.max_fee), (old.tip, new.tip)] {
                assert!(new > old && new - old >= old / 8, "{old} to {new}");
            }
            assert_eq!(old.replaced(&calm, new.max_fee), Ok(new));
            assert!(old.replaced(&calm, new.max_fee - 1).is_err());
        }
        let spike = Market { base_fee: 50 * GWEI, tip: 2 * GWEI };
        let old = Fees { max_fee: 21 * GWEI, tip: GWEI };
        assert_eq!(old.replaced(&spike, 200 * GWEI), Ok(Fees { max_fee: 102 * GWEI, tip: 2 * GWEI }));
        assert_eq!(old.replaced(&spike, 60 * GWEI), Ok(Fees { max_fee: 60 * GWEI, tip: 2 * GWEI }));
        assert_eq!(old.replaced(&spike, 40 * GWEI), Err(AboveCap { needed: 52 * GWEI, cap: 40 * GWEI }));
    }

    #[test]
    fn the_worst_case_counts_gas_and_bytes_and_never_wraps() {
        let fees = Fees { max_fee: 3, tip: 1 };
        assert_eq!(fees.cost_max(100, U256::from(7)), U256::from(307));
        let fees = Fees { max_fee: u128::MAX, tip: 0 };
        assert_eq!(fees.cost_max(u64::MAX, U256::MAX), U256::MAX);
    }
}
