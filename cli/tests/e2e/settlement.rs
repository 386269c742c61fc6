//! From usage to a paid claim, by the commands a settlement operator types, on a local chain.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

const OPENLORA: &str = env!("CARGO_BIN_EXE_openlora");
const ANN: &str = "0x00000000000000000000000000000000000a0001";
const BOB: &str = "0x00000000000000000000000000000000000a0002";
const ACME: &str = "0x00000000000000000000000000000000000a0003";

/// `openlora chain dev`, ended when dropped.
pub(crate) struct LocalChain(Child);

impl Drop for LocalChain {
    fn drop(&mut self) {
        // Gives it the time to end anvil, which it started.
        let _told = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ended = self.0.wait();
    }
}

/// A home with a local chain of its own.
pub(crate) struct Operator {
    pub(crate) home: tempfile::TempDir,
    pub(crate) chain: LocalChain,
}

impl Operator {
    pub(crate) fn new() -> Self {
        let home = tempfile::tempdir().expect("a temporary folder");
        // Where scripts/fetch-anvil.sh puts it.
        let fetched = match std::env::var_os("OPENLORA_HOME") {
            Some(home) => home.into(),
            None => Path::new(&std::env::var_os("HOME").expect("HOME")).join(".cache/openlora"),
        };
        std::os::unix::fs::symlink(fetched.join("anvil"), home.path().join("anvil")).expect("a link");
        let mut command = Command::new(OPENLORA);
        command.env("OPENLORA_HOME", home.path()).args(["--json", "chain", "dev", "--port", "0", "--window", "1"]);
        let mut process = command.stdout(Stdio::piped()).spawn().expect("it starts");
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        let chain = LocalChain(process);
        let addresses: Value =
            serde_json::from_str(&line).unwrap_or_else(|_| panic!("run scripts/fetch-anvil.sh: {line:?}"));
        let names = ["chain_id", "token", "timelock", "governor", "settlement", "datanets", "models"];
        assert!(names.iter().all(|name| !addresses[name].is_null()), "{addresses}");
        Self { home, chain }
    }

    /// The settings that `chain dev` printed.
    pub(crate) fn settings(&self) -> Vec<(String, String)> {
        let text = std::fs::read_to_string(self.home.path().join("chain-dev/settings.sh")).expect("settings");
        let export = |line: &str| {
            let (name, value) = line.strip_prefix("export ")?.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        };
        text.lines().map(|line| export(line).expect("an export")).collect()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(OPENLORA);
        command.env("OPENLORA_HOME", self.home.path()).args(args);
        command.envs(self.settings());
        command
    }

    /// What a command answers in JSON, one value for each line.
    pub(crate) fn json(&self, args: &[&str]) -> Vec<Value> {
        let output = self.command(&[&["--json"], args].concat()).output().expect("it runs");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// What a command that must fail says.
    fn refused(&self, args: &[&str]) -> String {
        let output = self.command(args).output().expect("it runs");
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        String::from_utf8(output.stderr).expect("UTF-8")
    }
}

#[test]
fn usage_ends_in_claims_that_are_paid_once() {
    let operator = Operator::new();
    for (args, key) in [
        (&["ledger", "price", "adapters", "--prompt", "1000000", "--cached", "0", "--completion", "3000000"][..], "p"),
        (&["ledger", "split", "adapters", "--owner", "3000", "--contributors", "5000", "--operator", "2000"], "s"),
        (&["ledger", "deposit", "shop", "1000000"], "d"),
        (&["ledger", "address", "contributor/ann", ANN], "a1"),
        (&["ledger", "address", "contributor/bob", BOB], "a2"),
        (&["ledger", "address", "owner/acme", ACME], "a3"),
    ] {
        operator.json(&[args, &["--key", key]].concat());
    }
    let usage: Vec<String> = (0..10)
        .map(|i| {
            let line = json!({"key": format!("r{i}"), "application": "shop", "alias": "acme/cwe", "generation": "ab".repeat(32),
                "prompt": 100, "completion": 100, "receipt": format!("receipt-{i}"), "owner": "acme",
                "shares": [["ann", 3], ["bob", 1]], "unattributed": 1});
            line.to_string()
        })
        .collect();
    let file = operator.home.path().join("usage.jsonl");
    std::fs::write(&file, usage.join("\n")).expect("written");
    let file = file.to_str().expect("UTF-8");
    for _ in 0..2 {
        // Posted again, nothing changes.
        assert_eq!(operator.json(&["ledger", "post", file]), [json!({"posted": 10})]);
    }
    // 100 + 300 a request: 3 of 5 parts of a half to ann, 1 to bob; 3 in 10 to acme.
    let paid = [(ANN, 1_200_u64), (BOB, 400), (ACME, 1_200)];

    assert!(operator.refused(&["settle", "propose"]).contains("run `openlora settle seal`"));
    let sealed = operator.json(&["settle", "seal"]);
    assert_eq!(sealed[0]["manifest"]["total"], "2800");
    assert_eq!(operator.json(&["settle", "seal"]), [json!({"epoch": 1, "new": false})]);
    let unfunded = operator.refused(&["settle", "propose"]);
    assert!(unfunded.contains("pays 2800 more units than are there"), "{unfunded}");
    for _ in 0..2 {
        // Sent again under the same key, nothing more is sent.
        assert_eq!(operator.json(&["settle", "fund", "2800", "--key", "first"]), [json!({"held": "2800"})]);
    }
    assert_eq!(operator.json(&["settle", "propose"])[0]["proposed"], true);
    assert_eq!(operator.json(&["settle", "watch", "--once"])[0]["right"], true);
    let bundle = operator.home.path().join("bundles/epoch-1.json");
    let bundle = bundle.to_str().expect("UTF-8");
    let verified = operator.json(&["settle", "verify", bundle]);
    assert_eq!((&verified[0]["ok"], &verified[0]["chain"]), (&json!(true), &Value::Null));
    let settings = operator.settings();
    let (_, rpc) = settings.iter().find(|(name, _)| name == "OPENLORA_SETTLEMENT_RPC_URL").expect("a node");
    let on_chain = |standing: &str| {
        let verified = operator.json(&["settle", "verify", bundle, "--rpc", rpc]);
        assert!(verified[0]["chain"].as_str().is_some_and(|chain| chain.starts_with(standing)), "{verified:?}");
    };
    on_chain("Proposed");
    assert_eq!(operator.json(&["settle", "finalize", "--wait"])[0]["final"], true);
    on_chain("Finalized");
    let forged = std::fs::read_to_string(bundle).expect("a bundle").replacen("\"1200\"", "\"1201\"", 1);
    let forged_at = operator.home.path().join("forged.json");
    std::fs::write(&forged_at, forged).expect("written");
    let refused = operator.refused(&["settle", "verify", forged_at.to_str().expect("UTF-8")]);
    assert!(refused.contains("the bundle says total 2800"), "{refused}");
    assert_eq!(operator.json(&["settle", "status"])[0]["next"], "openlora settle seal");

    for _ in 0..2 {
        // Claimed again, nothing more is paid.
        let claims = operator.json(&["settle", "claim", "--all"]);
        assert_eq!(claims.len(), 3);
        for (account, amount) in paid {
            let claim =
                claims.iter().find(|claim| claim["account"].as_str().map(str::to_lowercase) == Some(account.into()));
            let claim = claim.expect("its claim");
            assert_eq!((&claim["earned"], &claim["paid"]), (&json!(amount.to_string()), &json!(amount.to_string())));
        }
    }
    let proof = operator.command(&["settle", "proof", ANN]).output().expect("it runs");
    let proof: Value = serde_json::from_slice(&proof.stdout).expect("JSON");
    assert_eq!((&proof["cumulative"], &proof["proof"].as_array().expect("siblings").len()), (&json!("1200"), &2));
    assert!(operator.refused(&["settle", "proof", &ANN.replace("a0001", "a0009")]).contains("has earned nothing"));
    assert_eq!(operator.json(&["ledger", "verify"])[0]["ok"], true);
    assert_eq!(operator.json(&["ledger", "balance", "application/shop"])[0]["available"], "996000");
}
