//! Everything of contracts/ onto a chain, in the order of docs/contracts.md: at the end only the timelock, whose orders come from
//! the governor, can change anything.
//!
//! Each step is an intent of its own, so that a deployment that was cut off goes on where it ended when it is called again
//! with the same label.

use alloy::primitives::aliases::{U48, U96};
use alloy::primitives::{Address, B256, Bytes, U256};
use alloy::sol_types::{SolCall, SolConstructor};
use serde::{Deserialize, Serialize};

use crate::contracts::{DatanetRegistry, ModelRegistry, OpenGovernor, OpenToken, RewardSettlement, TimelockController};
use crate::error::SettlementError;
use crate::outbox::{Content, Intent, Status};
use crate::sender::Sender;

/// Gas of the largest contract's creation, with room.
const GAS_MAX: u64 = 10_000_000;

/// What the constructors are given. Windows and delays are seconds, amounts of tokens their smallest unit, bonds wei.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Gets the token's whole supply.
    pub holder: Address,
    /// The supply.
    pub supply: U256,
    /// May propose epochs.
    pub proposer: Address,
    /// Rules on disputes.
    pub arbiter: Address,
    /// May register models.
    pub registrar: Address,
    /// What a proposal, a challenge and a dispute cost.
    pub bond: u64,
    /// From a proposal to its finalization.
    pub challenge_window: u32,
    /// What the arbiter has.
    pub arbitration_window: u32,
    /// From asking for a stake to getting it.
    pub unstake_delay: u32,
    /// From a decision to its execution.
    pub timelock_delay: u32,
    /// From a governor's proposal to the vote.
    pub voting_delay: u32,
    /// Length of a vote.
    pub voting_period: u32,
    /// Votes that a governor's proposal needs.
    pub proposal_threshold: U256,
    /// Of the supply, for a vote to count.
    pub quorum_percent: u32,
}

impl Plan {
    /// What a public chain should have: a day to challenge, two before anything changes. `account` begins with every part.
    #[must_use]
    pub fn new(account: Address) -> Self {
        const DAY: u32 = 86_400;
        let token = U256::from(10).pow(U256::from(18));
        Self {
            holder: account,
            supply: token * U256::from(1_000_000_000),
            proposer: account,
            arbiter: account,
            registrar: account,
            bond: 10_000_000_000_000_000,
            challenge_window: DAY,
            arbitration_window: 3 * DAY,
            unstake_delay: 7 * DAY,
            timelock_delay: 2 * DAY,
            voting_delay: DAY,
            voting_period: 5 * DAY,
            proposal_threshold: token * U256::from(100_000),
            quorum_percent: 4,
        }
    }

    /// For a chain of one's own, where nobody wants to wait: windows and delays of `seconds`.
    #[must_use]
    pub fn local(account: Address, seconds: u32) -> Self {
        Self {
            challenge_window: seconds,
            arbitration_window: seconds,
            unstake_delay: seconds,
            timelock_delay: seconds,
            voting_delay: seconds,
            voting_period: seconds,
            ..Self::new(account)
        }
    }
}

/// Where the contracts are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deployment {
    /// EIP-155 id.
    pub chain_id: u64,
    /// `OpenToken`.
    pub token: Address,
    /// `TimelockController`.
    pub timelock: Address,
    /// `OpenGovernor`.
    pub governor: Address,
    /// `RewardSettlement`.
    pub settlement: Address,
    /// `DatanetRegistry`.
    pub datanets: Address,
    /// `ModelRegistry`.
    pub models: Address,
}

/// Deploys all contracts from the sender's account; `told` hears of each step as it is in a block. `label` names the deployment
/// among others of the same account.
///
/// # Errors
/// The sender's; [`SettlementError::NotDeployed`] with the reason of a step that failed.
pub async fn deploy(
    sender: &Sender,
    label: &str,
    plan: &Plan,
    told: &mut (dyn FnMut(&str, Option<Address>) + Send),
) -> Result<Deployment, SettlementError> {
    let mut steps = Steps { sender, label, told };
    let deployer = sender.account();
    let token = OpenToken::constructorCall { holder: plan.holder, supply: plan.supply };
    let token = steps.create("OpenToken", &OpenToken::BYTECODE, &token).await?;
    let timelock = TimelockController::constructorCall {
        minDelay: U256::from(plan.timelock_delay),
        proposers: Vec::new(),
        // Anyone may execute what has been decided and waited for.
        executors: vec![Address::ZERO],
        admin: deployer,
    };
    let timelock = steps.create("TimelockController", &TimelockController::BYTECODE, &timelock).await?;
    let governor = OpenGovernor::constructorCall {
        token,
        timelock,
        votingDelaySeconds: U48::from(plan.voting_delay),
        votingPeriodSeconds: plan.voting_period,
        proposalThresholdUnits: plan.proposal_threshold,
        quorumPercent: U256::from(plan.quorum_percent),
    };
    let governor = steps.create("OpenGovernor", &OpenGovernor::BYTECODE, &governor).await?;
    let settlement = RewardSettlement::constructorCall {
        token,
        admin: timelock,
        proposer: plan.proposer,
        arbiter: plan.arbiter,
        terms_: RewardSettlement::Terms {
            bond: U96::from(plan.bond),
            challengeWindow: plan.challenge_window,
            arbitrationWindow: plan.arbitration_window,
        },
    };
    let settlement = steps.create("RewardSettlement", &RewardSettlement::BYTECODE, &settlement).await?;
    let datanets = DatanetRegistry::constructorCall {
        token,
        admin: timelock,
        arbiter: plan.arbiter,
        terms_: DatanetRegistry::Terms {
            bond: U96::from(plan.bond),
            arbitrationWindow: plan.arbitration_window,
            unstakeDelay: plan.unstake_delay,
        },
    };
    let datanets = steps.create("DatanetRegistry", &DatanetRegistry::BYTECODE, &datanets).await?;
    let models = ModelRegistry::constructorCall { datanets, admin: timelock, registrar: plan.registrar };
    let models = steps.create("ModelRegistry", &ModelRegistry::BYTECODE, &models).await?;
    for (role, name) in [("PROPOSER_ROLE", "proposer"), ("CANCELLER_ROLE", "canceller")] {
        let role = alloy::primitives::keccak256(role);
        let call = TimelockController::grantRoleCall { role, account: governor };
        steps.call(&format!("governor as the timelock's {name}"), timelock, &call).await?;
    }
    let call = TimelockController::renounceRoleCall { role: B256::ZERO, callerConfirmation: deployer };
    steps.call("the deployer gives up the timelock", timelock, &call).await?;
    let chain_id = sender.chain().id();
    Ok(Deployment { chain_id, token, timelock, governor, settlement, datanets, models })
}

struct Steps<'a> {
    sender: &'a Sender,
    label: &'a str,
    told: &'a mut (dyn FnMut(&str, Option<Address>) + Send),
}

impl Steps<'_> {
    async fn create<C: SolConstructor>(
        &mut self,
        name: &str,
        code: &Bytes,
        arguments: &C,
    ) -> Result<Address, SettlementError> {
        let data = [code.as_ref(), &arguments.abi_encode()].concat().into();
        let nonce = self.run(name, None, data).await?;
        let address = self.sender.account().create(nonce);
        (self.told)(name, Some(address));
        Ok(address)
    }

    async fn call<C: SolCall>(&mut self, what: &str, to: Address, call: &C) -> Result<(), SettlementError> {
        self.run(what, Some(to), call.abi_encode().into()).await?;
        (self.told)(what, None);
        Ok(())
    }

    /// The nonce of a step that is in a block.
    async fn run(&self, what: &str, to: Option<Address>, data: Bytes) -> Result<u64, SettlementError> {
        let key = format!("deploy {} {what}", self.label);
        let content = Content { to, data, value: U256::ZERO, gas_max: GAS_MAX, done: None };
        let id = self.sender.submit(&Intent { key, content }).await?;
        let status = self.sender.wait_until(id, |status| matches!(status, Status::Mined { .. })).await?;
        let failed = |reason| Err(SettlementError::NotDeployed { what: what.to_owned(), reason });
        match status {
            Status::Mined { nonce, succeeded: true, .. } | Status::Finalized { nonce, reverted: None, .. } => Ok(nonce),
            Status::Mined { .. } => failed("it reverted".to_owned()),
            Status::Finalized { reverted, .. } => failed(reverted.unwrap_or_default()),
            Status::Refused { reason } => failed(reason),
            other => failed(format!("{other:?}")),
        }
    }
}
