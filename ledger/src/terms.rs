//! What a request costs and who gets it: prices, the split, and exact division.

use openlora_types::InvalidField;
use serde::{Deserialize, Serialize};

use crate::{
    account::{Account, Amount, check_text},
    error::LedgerError,
};

/// Tokens that a price is for.
const PER: u128 = 1_000_000;
/// Basis points in a whole.
const WHOLE: u32 = 10_000;

/// What prices and splits are set for. The most specific one that is set holds: generation, alias, default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Target {
    /// One generation, 64 hexadecimal digits.
    Generation(String),
    /// Whatever an alias stands for.
    Alias(String),
    /// Adapters for which nothing else is set.
    Adapters,
    /// The base model by itself.
    Base,
}

impl Target {
    /// Its text in the database.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Generation(generation) => format!("generation/{generation}"),
            Self::Alias(alias) => format!("alias/{alias}"),
            Self::Adapters => "adapters".into(),
            Self::Base => "base".into(),
        }
    }

    pub(crate) fn check(&self) -> Result<(), InvalidField> {
        match self {
            Self::Generation(text) => openlora_types::Generation::from_hex(text).map(drop),
            Self::Alias(text) => check_text("target.alias", text),
            Self::Adapters | Self::Base => Ok(()),
        }
    }
}

/// Units of an asset for 1,000,000 tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    /// Prompt tokens that were computed.
    pub prompt: u64,
    /// Prompt tokens found in the cache: not dearer than `prompt`.
    pub cached: u64,
    /// Tokens of the answer.
    pub completion: u64,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokens {
    /// Of the prompt, those found in the cache included.
    pub prompt: u64,
    /// Of those, found in the cache.
    pub cached: u64,
    /// Of the answer.
    pub completion: u64,
}

/// A fee. `charged` is the price rounded up to a whole unit; `shared` is it rounded down; dust is the difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fee {
    /// What the application pays.
    pub charged: u128,
    /// What is split.
    pub shared: u128,
}

impl Prices {
    pub(crate) fn check(&self) -> Result<(), InvalidField> {
        if self.cached > self.prompt {
            return Err(InvalidField::new("prices.cached", "must not be above prices.prompt"));
        }
        Ok(())
    }

    /// What `tokens` cost: the three products are added before the one division.
    ///
    /// # Errors
    /// [`LedgerError::Overflow`]; [`LedgerError::Invalid`] where more tokens were cached than the prompt has.
    pub fn fee(&self, tokens: &Tokens) -> Result<Fee, LedgerError> {
        let computed = tokens.prompt.checked_sub(tokens.cached);
        let computed = computed.ok_or_else(|| InvalidField::new("tokens.cached", "must not be above tokens.prompt"))?;
        let times = |price: u64, tokens: u64| u128::from(price) * u128::from(tokens);
        let parts = [
            times(self.prompt, computed),
            times(self.cached, tokens.cached),
            times(self.completion, tokens.completion),
        ];
        let sum =
            parts.into_iter().try_fold(0_u128, u128::checked_add).ok_or(LedgerError::Overflow { what: "the fee" })?;
        Ok(Fee { charged: sum.div_ceil(PER), shared: sum / PER })
    }
}

/// Who gets what part of a fee, in basis points that sum to 10,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// The adapter's owner.
    pub owner: u32,
    /// Those whose data shaped the answer.
    pub contributors: u32,
    /// The base model's owner.
    pub base_owner: u32,
    /// Owners of the adapters this one was trained from, alike.
    pub parents: u32,
    /// Who runs the server.
    pub operator: u32,
}

/// Whom a request's fee goes to. A part for which nobody is named goes to the pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payees {
    /// The adapter's owner.
    pub owner: Option<String>,
    /// The base model's owner.
    pub base_owner: Option<String>,
    /// Owners of parent adapters; one named twice gets two shares.
    pub parents: Vec<String>,
}

impl Payees {
    pub(crate) fn check(&self, parents_max: usize) -> Result<(), InvalidField> {
        if self.parents.len() > parents_max {
            let why = format!("has {} entries; the limit parents_max is {parents_max}", self.parents.len());
            return Err(InvalidField::new("payees.parents", why));
        }
        self.owner.iter().chain(&self.base_owner).chain(&self.parents).try_for_each(|name| check_text("payees", name))
    }
}

impl Split {
    fn weights(&self) -> [u32; 5] {
        [self.owner, self.contributors, self.base_owner, self.parents, self.operator]
    }

    pub(crate) fn check(&self) -> Result<(), InvalidField> {
        let sum: u64 = self.weights().into_iter().map(u64::from).sum();
        if sum != u64::from(WHOLE) {
            return Err(InvalidField::new("split", format!("must sum to {WHOLE} basis points and sums to {sum}")));
        }
        Ok(())
    }

    /// Who gets how much of `fee`: none twice, ascending by account, none zero. `receipt`: whether contributors can be
    /// named later; without one their part goes to the pool.
    ///
    /// # Errors
    /// [`LedgerError::Overflow`], which no valid split meets.
    pub fn parts(&self, fee: Fee, payees: &Payees, receipt: bool) -> Result<Vec<(Account, Amount)>, LedgerError> {
        let [owner, contributors, base_owner, parents, operator] =
            <[u128; 5]>::try_from(divide(fee.shared, &self.weights().map(u64::from))?).expect("one for each weight");
        let pool = |account: Option<Account>| account.unwrap_or(Account::Pool);
        let mut parts = vec![
            (pool(payees.owner.clone().map(Account::Owner)), owner),
            (if receipt { Account::Held } else { Account::Pool }, contributors),
            (pool(payees.base_owner.clone().map(Account::BaseOwner)), base_owner),
            (Account::Operator, operator),
            (Account::Dust, fee.charged - fee.shared),
        ];
        let mut names = payees.parents.clone();
        names.sort();
        if names.is_empty() {
            parts.push((Account::Pool, parents));
        } else {
            let each = divide(parents, &vec![1; names.len()])?;
            parts.extend(names.into_iter().map(Account::Owner).zip(each));
        }
        merge(parts)
    }
}

/// Sorts by account, adds up what one account gets several times and leaves out zeros.
pub(crate) fn merge(parts: Vec<(Account, u128)>) -> Result<Vec<(Account, Amount)>, LedgerError> {
    let mut merged = std::collections::BTreeMap::<String, (Account, u128)>::new();
    for (account, amount) in parts {
        let sum = &mut merged.entry(account.to_string()).or_insert((account, 0)).1;
        *sum = sum.checked_add(amount).ok_or(LedgerError::Overflow { what: "a part of a fee" })?;
    }
    Ok(merged
        .into_values()
        .filter(|(_, amount)| *amount > 0)
        .map(|(account, amount)| (account, Amount(amount)))
        .collect())
}

/// Divides `amount` in proportion to `weights` by largest remainder: everyone gets the whole part of their share, and
/// the units left over go one each to the largest fractions; among equal ones to the first. Sums to `amount` exactly.
///
/// # Errors
/// [`LedgerError::Overflow`] where the weights sum to 0, or to 2^64 or more.
pub fn divide(amount: u128, weights: &[u64]) -> Result<Vec<u128>, LedgerError> {
    let total = weights.iter().try_fold(0_u64, |sum, &weight| sum.checked_add(weight)).filter(|&total| total > 0);
    let total = u128::from(total.ok_or(LedgerError::Overflow { what: "the sum of the weights" })?);
    // amount = whole · total + rest, so that no product leaves 128 bits.
    let (whole, rest) = (amount / total, amount % total);
    let mut shares = Vec::with_capacity(weights.len());
    let mut order = Vec::with_capacity(weights.len());
    let mut left = amount;
    for (place, &weight) in weights.iter().enumerate() {
        let product = rest * u128::from(weight);
        let share = whole * u128::from(weight) + product / total;
        left -= share;
        shares.push(share);
        order.push((std::cmp::Reverse(product % total), place));
    }
    order.sort_unstable();
    for &(_, place) in order.iter().take(left as usize) {
        shares[place] += 1;
    }
    Ok(shares)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `a · b` and division in base 2^32 digits, by hand: what `divide` does in 128 bits is done here without a bound.
    fn mul_div(a: u128, b: u64, by: u128) -> (u128, u128) {
        // Bit by bit: the quotient and remainder of a · b by `by` (below 2^64).
        let (mut quotient, mut remainder) = (0_u128, 0_u128);
        for bit in (0..64).rev() {
            quotient = quotient.checked_mul(2).expect("shares do not pass the amount");
            remainder *= 2;
            quotient += remainder / by;
            remainder %= by;
            if b >> bit & 1 == 1 {
                quotient += a / by;
                remainder += a % by;
                quotient += remainder / by;
                remainder %= by;
            }
        }
        (quotient, remainder)
    }

    fn oracle(amount: u128, weights: &[u64]) -> Vec<u128> {
        let total: u128 = weights.iter().map(|&weight| u128::from(weight)).sum();
        let mut shares: Vec<_> = weights.iter().map(|&weight| mul_div(amount, weight, total)).collect();
        let mut left = amount - shares.iter().map(|share| share.0).sum::<u128>();
        while left > 0 {
            let best = (0..shares.len()).rev().max_by_key(|&i| shares[i].1).expect("somebody");
            shares[best].0 += 1;
            shares[best].1 = 0;
            left -= 1;
        }
        shares.into_iter().map(|share| share.0).collect()
    }

    proptest! {
        #[test]
        fn shares_are_those_of_unbounded_arithmetic_and_sum_exactly(
            amount in prop_oneof![any::<u128>(), 0_u128..1_000],
            weights in prop::collection::vec(prop_oneof![0_u64..4, 0_u64..(1 << 58)], 1..60),
        ) {
            prop_assume!(weights.iter().any(|&weight| weight > 0));
            let shares = divide(amount, &weights).expect("weights below 2^64");
            prop_assert_eq!(shares.iter().sum::<u128>(), amount);
            prop_assert_eq!(shares, oracle(amount, &weights));
        }

        #[test]
        fn parts_of_a_fee_sum_to_what_is_charged(
            tokens in (0_u64..1 << 40, 0_u64..1 << 40, 0_u64..1 << 40),
            prices in (0_u64..1 << 50, any::<u64>()),
            cuts in prop::collection::vec(0_u32..=10_000, 4),
            (owner, base, parents, receipt) in (any::<bool>(), any::<bool>(), 0_usize..5, any::<bool>()),
        ) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            let split = Split {
                owner: cuts[0],
                contributors: cuts[1] - cuts[0],
                base_owner: cuts[2] - cuts[1],
                parents: cuts[3] - cuts[2],
                operator: 10_000 - cuts[3],
            };
            split.check().expect("sums to a whole");
            let payees = Payees {
                owner: owner.then(|| "o".into()),
                base_owner: base.then(|| "b".into()),
                parents: (0..parents).map(|i| format!("p{}", i % 3)).collect(),
            };
            let prices = Prices { prompt: prices.0, cached: prices.0 / 2, completion: prices.1 };
            let tokens = Tokens { prompt: tokens.0.max(tokens.1), cached: tokens.1, completion: tokens.2 };
            let fee = prices.fee(&tokens).expect("below 2^128");
            let parts = split.parts(fee, &payees, receipt).expect("divided");
            prop_assert_eq!(parts.iter().map(|part| part.1.0).sum::<u128>(), fee.charged);
            prop_assert!(fee.charged - fee.shared <= 1);
        }
    }

    #[test]
    fn equal_fractions_go_to_the_first_and_weights_without_a_sum_are_refused() {
        assert_eq!(divide(2, &[1, 1, 1]).expect("divided"), [1, 1, 0]);
        assert_eq!(divide(u128::MAX, &[1, 1]).expect("divided"), [u128::MAX / 2 + 1, u128::MAX / 2]);
        for weights in [&[][..], &[0, 0], &[u64::MAX, 1]] {
            assert!(matches!(divide(1, weights), Err(LedgerError::Overflow { .. })), "{weights:?}");
        }
    }

    #[test]
    fn a_fee_that_does_not_fit_is_refused_by_name() {
        let prices = Prices { prompt: u64::MAX, cached: u64::MAX, completion: u64::MAX };
        let tokens = Tokens { prompt: u64::MAX, cached: 0, completion: u64::MAX };
        let error = prices.fee(&tokens).expect_err("two products of 2^128");
        assert!(matches!(error, LedgerError::Overflow { what: "the fee" }), "{error}");
    }
}
