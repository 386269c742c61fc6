//! The contracts as Rust sees them: made from `contracts/abi`, which `contracts/build.sh` writes and checks.

#![allow(missing_docs, clippy::too_many_arguments, reason = "generated from the ABI; contracts/src has the words")]

use alloy::primitives::{B256, keccak256};
use alloy::sol;
use serde::Deserialize;

sol!(
    #[derive(Debug)]
    RewardSettlement,
    "../contracts/abi/RewardSettlement.json"
);
sol!(
    #[derive(Debug)]
    OpenToken,
    "../contracts/abi/OpenToken.json"
);
sol!(
    #[derive(Debug)]
    DatanetRegistry,
    "../contracts/abi/DatanetRegistry.json"
);
sol!(
    #[derive(Debug)]
    ModelRegistry,
    "../contracts/abi/ModelRegistry.json"
);
sol!(
    #[derive(Debug)]
    OpenGovernor,
    "../contracts/abi/OpenGovernor.json"
);
sol!(
    #[derive(Debug)]
    TimelockController,
    "../contracts/abi/TimelockController.json"
);

/// Roles that a key of the settings may need.
const ROLES: [&str; 3] = ["PROPOSER_ROLE", "ARBITER_ROLE", "REGISTRAR_ROLE"];

/// Names the error that one of these contracts reverted with, and its values.
#[must_use]
pub fn describe(data: &[u8]) -> Option<String> {
    use alloy::sol_types::{SolError as _, SolInterface as _};
    if let Ok(lacks) = RewardSettlement::AccessControlUnauthorizedAccount::abi_decode(data) {
        let named = ROLES.into_iter().find(|role| keccak256(role) == lacks.neededRole);
        let role = named.map_or_else(|| lacks.neededRole.to_string(), str::to_owned);
        let account = lacks.account;
        return Some(format!(
            "{account} does not hold the role {role}; set settlement.keystore to the key of an account that does, `openlora \
             doctor` tells"
        ));
    }
    let named = [
        RewardSettlement::RewardSettlementErrors::abi_decode(data).map(|error| format!("{error:?}")),
        DatanetRegistry::DatanetRegistryErrors::abi_decode(data).map(|error| format!("{error:?}")),
        ModelRegistry::ModelRegistryErrors::abi_decode(data).map(|error| format!("{error:?}")),
        OpenToken::OpenTokenErrors::abi_decode(data).map(|error| format!("{error:?}")),
        OpenGovernor::OpenGovernorErrors::abi_decode(data).map(|error| format!("{error:?}")),
        TimelockController::TimelockControllerErrors::abi_decode(data).map(|error| format!("{error:?}")),
    ];
    named.into_iter().find_map(Result::ok)
}

/// What a contract's deployed code must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code {
    /// The contract's name.
    pub name: &'static str,
    artifact: &'static str,
}

macro_rules! codes {
    ($($(#[$meta:meta])* $constant:ident = $name:literal,)*) => {
        impl Code {
            $($(#[$meta])* pub const $constant: Self = Self {
                name: $name,
                artifact: include_str!(concat!("../../contracts/abi/", $name, ".json")),
            };)*
        }
    };
}

codes! {
    SETTLEMENT = "RewardSettlement",
    TOKEN = "OpenToken",
    DATANETS = "DatanetRegistry",
    MODELS = "ModelRegistry",
    GOVERNOR = "OpenGovernor",
    TIMELOCK = "TimelockController",
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Artifact {
    deployed_bytecode_hash: B256,
    deployed_bytecode_length: usize,
    immutable_references: Vec<Reference>,
}

/// Where a value that the constructor was given stands in the code.
#[derive(Deserialize)]
struct Reference {
    start: usize,
    length: usize,
}

impl Code {
    /// Whether `code` is this contract's, whatever its constructor was given.
    #[must_use]
    pub fn is(&self, code: &[u8]) -> bool {
        let artifact: Artifact = serde_json::from_str(self.artifact).expect("build.sh wrote it");
        if code.len() != artifact.deployed_bytecode_length {
            return false;
        }
        let mut code = code.to_vec();
        for Reference { start, length } in artifact.immutable_references {
            code[start..start + length].fill(0);
        }
        keccak256(code) == artifact.deployed_bytecode_hash
    }
}
