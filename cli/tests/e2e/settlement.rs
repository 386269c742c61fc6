//! From usage to a paid claim, by the commands a settlement operator types, on a local chain.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use serde_json::{Value, json};

use crate::support::OPENLORA;

pub(crate) const ANN: &str = "0x00000000000000000000000000000000000a0001";
const BOB: &str = "0x00000000000000000000000000000000000a0002";
const ACME: &str = "0x00000000000000000000000000000000000a0003";
/// Wei of 100 coins, as RPC takes it.
const RICH: &str = "0x56bc75e2d63100000";

/// Where scripts/fetch-anvil.sh puts anvil, under the home of whoever runs the tests.
fn fetched() -> PathBuf {
    let home = match std::env::var_os("OPENLORA_HOME") {
        Some(home) => home.into(),
        None => Path::new(&std::env::var_os("HOME").expect("HOME")).join(".cache/openlora"),
    };
    home.join("anvil")
}

/// Somebody's folder and settings.
pub(crate) struct Home {
    dir: tempfile::TempDir,
    pub(crate) settings: Vec<(String, String)>,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::os::unix::fs::symlink(fetched(), dir.path().join("anvil")).expect("a link");
        Self { dir, settings: Vec::new() }
    }

    /// With a key of its own, which has nothing; and its account.
    fn with_key() -> (Self, String) {
        let mut home = Self::new();
        for (name, file) in [("KEYSTORE", "key.json"), ("PASSWORD_FILE", "password")] {
            let path = home.path(file);
            home.set(name, &path);
        }
        let made = home.command(&["chain", "key"]).output().expect("it runs");
        let text = String::from_utf8(made.stdout).expect("UTF-8");
        let account = text.strip_prefix("account").expect("an account").trim().to_owned();
        assert!(home.refused(&["chain", "key"]).contains("key.json"), "a key is never written over");
        (home, account)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    /// Changes `settlement.NAME`.
    fn set(&mut self, name: &str, value: &str) {
        let name = format!("OPENLORA_SETTLEMENT_{name}");
        self.settings.retain(|(known, _)| *known != name);
        self.settings.push((name, value.to_owned()));
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(OPENLORA);
        command.env("OPENLORA_HOME", self.dir.path()).args(args);
        command.envs(self.settings.iter().cloned());
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(&[&["--json"], args].concat()).output().expect("it runs")
    }

    /// What a command answers in JSON, one value for each line.
    pub(crate) fn json(&self, args: &[&str]) -> Vec<Value> {
        let output = self.output(args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        lines(&output)
    }

    /// What a command that must fail says.
    fn refused(&self, args: &[&str]) -> String {
        let output = self.command(args).output().expect("it runs");
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        String::from_utf8(output.stderr).expect("UTF-8")
    }

    /// A line of `openlora doctor`: whether it is ok, and what it says.
    fn doctor(&self, what: &str) -> (bool, String) {
        let found = lines(&self.output(&["doctor"])).remove(0);
        let line = found["findings"].as_array().expect("findings").iter().find(|line| line["what"] == what).cloned();
        let line = line.unwrap_or_else(|| panic!("no line {what}: {found}"));
        (line["ok"] == true, line["detail"].as_str().expect("text").to_owned())
    }

    /// Prices, a deposit, addresses, and `requests` whose answers ann, bob and nobody shaped 3, 1 and 1 parts of.
    pub(crate) fn earn(&self, requests: std::ops::Range<u32>) {
        for (args, key) in [
            (
                &["ledger", "price", "adapters", "--prompt", "1000000", "--cached", "0", "--completion", "3000000"][..],
                "p",
            ),
            (&["ledger", "split", "adapters", "--owner", "3000", "--contributors", "5000", "--operator", "2000"], "s"),
            (&["ledger", "deposit", "shop", "1000000"], "d"),
            (&["ledger", "address", "contributor/ann", ANN], "a1"),
            (&["ledger", "address", "contributor/bob", BOB], "a2"),
            (&["ledger", "address", "owner/acme", ACME], "a3"),
        ] {
            self.json(&[args, &["--key", key]].concat());
        }
        let usage = requests.clone().map(|i| {
            let line = json!({"key": format!("r{i}"), "application": "shop", "alias": "acme/cwe",
                "generation": "ab".repeat(32), "prompt": 100, "completion": 100, "receipt": format!("receipt-{i}"),
                "owner": "acme", "shares": [["ann", 3], ["bob", 1]], "unattributed": 1});
            line.to_string()
        });
        let file = self.path("usage.jsonl");
        fs::write(&file, usage.collect::<Vec<_>>().join("\n")).expect("written");
        for _ in 0..2 {
            // Posted again, nothing changes.
            assert_eq!(self.json(&["ledger", "post", &file]), [json!({"posted": requests.len()})]);
        }
    }
}

fn lines(output: &Output) -> Vec<Value> {
    let text = std::str::from_utf8(&output.stdout).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// A process that ends when it is told to, told when dropped.
pub(crate) struct Running(Child);

impl Running {
    /// The next line of JSON that it prints.
    fn next(lines: &mut impl Iterator<Item = std::io::Result<String>>) -> Value {
        let line = lines.next().expect("it goes on").expect("UTF-8");
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("no JSON: {line}"))
    }

    fn stdout(&mut self) -> std::io::Lines<BufReader<ChildStdout>> {
        BufReader::new(self.0.stdout.take().expect("piped")).lines()
    }

    /// As Ctrl-C.
    fn interrupt(&mut self) -> Option<i32> {
        let told = Command::new("kill").args(["-INT", &self.0.id().to_string()]).status();
        assert!(told.expect("kill runs").success());
        self.0.wait().expect("it ends").code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            // Gives a local chain the time to end anvil, which it started.
            let _told = Command::new("kill").arg(self.0.id().to_string()).status();
            let _ended = self.0.wait();
        }
    }
}

/// A home with a local chain of its own.
pub(crate) struct Operator {
    pub(crate) home: Home,
    pub(crate) chain: Running,
}

impl Operator {
    pub(crate) fn new() -> Self {
        let mut home = Home::new();
        let mut command = home.command(&["--json", "chain", "dev", "--port", "0", "--window", "1"]);
        let mut chain = Running(command.stdout(Stdio::piped()).spawn().expect("it starts"));
        let addresses = Running::next(&mut chain.stdout());
        let names = ["chain_id", "token", "timelock", "governor", "settlement", "datanets", "models"];
        assert!(names.iter().all(|name| !addresses[name].is_null()), "{addresses}");
        // What it printed for a terminal.
        let settings = fs::read_to_string(home.path("chain-dev/settings.sh")).expect("settings");
        for line in settings.lines() {
            let export = line.strip_prefix("export OPENLORA_SETTLEMENT_").and_then(|export| export.split_once('='));
            let (name, value) = export.expect("an export");
            home.set(name, value);
        }
        Self { home, chain }
    }
}

/// Asks a node; the error is the node's.
pub(crate) fn ask(url: &str, method: &str, params: Value) -> Result<Value, Value> {
    let body = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).to_string();
    let mut stream = TcpStream::connect(url.trim_start_matches("http://")).expect("anvil listens");
    let length = body.len();
    write!(
        stream,
        "POST / HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a head");
    let answer: Value = serde_json::from_str(body).expect("JSON");
    if answer["error"].is_null() { Ok(answer["result"].clone()) } else { Err(answer["error"].clone()) }
}

/// A chain with nothing on it, whose every transaction is in a block at once.
struct Node {
    port: u16,
    _process: Running,
}

impl Node {
    fn start() -> Self {
        let program = fetched().join("1.7.1/anvil");
        let mut command = Command::new(&program);
        command.args(["--port", "0", "--optimism", "--slots-in-an-epoch", "1"]).stdout(Stdio::piped());
        let process = command.spawn().unwrap_or_else(|_| panic!("{}: run scripts/fetch-anvil.sh", program.display()));
        let mut process = Running(process);
        let mut lines = process.stdout();
        let port = lines.find_map(|line| line.ok()?.strip_prefix("Listening on 127.0.0.1:")?.parse().ok());
        std::thread::spawn(move || lines.for_each(drop));
        Self { port: port.expect("anvil says where it listens"), _process: process }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn ask(&self, method: &str, params: Value) -> Value {
        ask(&self.url(), method, params).unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    fn give(&self, account: &str, wei: &str) {
        self.ask("anvil_setBalance", json!([account, wei]));
    }

    /// Transactions that an account has sent, those that wait included.
    fn sent(&self, account: &str) -> Value {
        self.ask("eth_getTransactionCount", json!([account, "pending"]))
    }

    /// Deploys everything with the key of `home`, and lets its settings name it.
    fn deploy(&self, home: &mut Home) -> Value {
        let deployed = home.json(&["chain", "deploy", "--rpc", &self.url(), "--chain-id", "31337", "--window", "600"]);
        self.name(home, &deployed[0]);
        deployed[0].clone()
    }

    fn name(&self, home: &mut Home, deployed: &Value) {
        home.set("RPC_URL", &self.url());
        home.set("CHAIN_ID", "31337");
        home.set("CONTRACT", deployed["settlement"].as_str().expect("an address"));
    }
}

#[test]
fn usage_ends_in_claims_that_are_paid_once() {
    let Operator { home: operator, chain: _chain } = Operator::new();
    operator.earn(0..10);
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
    let bundle = &operator.path("bundles/epoch-1.json");
    let verified = operator.json(&["settle", "verify", bundle]);
    assert_eq!((&verified[0]["ok"], &verified[0]["chain"]), (&json!(true), &Value::Null));
    let (_, rpc) = operator.settings.iter().find(|(name, _)| name == "OPENLORA_SETTLEMENT_RPC_URL").expect("a node");
    let on_chain = |standing: &str| {
        let verified = operator.json(&["settle", "verify", bundle, "--rpc", rpc]);
        assert!(verified[0]["chain"].as_str().is_some_and(|chain| chain.starts_with(standing)), "{verified:?}");
    };
    on_chain("Proposed");
    assert_eq!(operator.json(&["settle", "finalize", "--wait"])[0]["final"], true);
    on_chain("Finalized");
    let forged = fs::read_to_string(bundle).expect("a bundle").replacen("\"1200\"", "\"1201\"", 1);
    let forged_at = operator.path("forged.json");
    fs::write(&forged_at, forged).expect("written");
    let refused = operator.refused(&["settle", "verify", &forged_at]);
    assert!(refused.contains("the bundle says total 2800"), "{refused}");
    assert_eq!(operator.json(&["settle", "status"])[0]["next"], "openlora settle seal");

    let unclaimed = |account: &str| {
        let held = operator.json(&["ledger", "balance", &format!("payout/{account}")]).remove(0);
        held["available"].as_str().expect("an amount").to_owned()
    };
    assert_eq!(unclaimed(ANN), "1200");
    // Anybody pays for anybody, with a key and a bundle of their own.
    let (other, account) = Home::with_key();
    ask(rpc, "anvil_setBalance", json!([account, RICH])).expect("rich");
    let (key, password) = (other.path("key.json"), other.path("password"));
    let with = ["settle", "claim", "--wait", "--bundle", bundle, "--key", &key, "--password-file", &password];
    let claims = operator.json(&[&with[..], &[ANN]].concat());
    assert_eq!((&claims[0]["earned"], &claims[0]["paid"]), (&json!("1200"), &json!("1200")));
    assert_eq!(unclaimed(ANN), "0");
    let own = operator.json(&with);
    let own_account = own[0]["account"].as_str().map(str::to_lowercase);
    assert_eq!((own_account, &own[0]["earned"]), (Some(account.to_lowercase()), &json!("0")));
    let entries = operator.json(&["ledger", "entries", "contributor/ann"]);
    assert_eq!((entries.len(), &entries[0]["other"]), (11, &json!(format!("payout/{ANN}"))));
    assert!(entries[1..].iter().all(|entry| entry["what"].as_str().is_some_and(|what| what.starts_with("receipt/"))));
    for _ in 0..2 {
        // Claimed again, nothing more is paid.
        let claims = operator.json(&["settle", "claim", "--all", "--wait"]);
        assert_eq!(claims.len(), 3);
        for (account, amount) in paid {
            let claim =
                claims.iter().find(|claim| claim["account"].as_str().map(str::to_lowercase) == Some(account.into()));
            let claim = claim.expect("its claim");
            assert_eq!((&claim["earned"], &claim["paid"]), (&json!(amount.to_string()), &json!(amount.to_string())));
        }
    }
    assert_eq!([ANN, BOB, ACME].map(unclaimed), ["0", "0", "0"]);
    let proof = operator.command(&["settle", "proof", ANN]).output().expect("it runs");
    let proof: Value = serde_json::from_slice(&proof.stdout).expect("JSON");
    assert_eq!((&proof["cumulative"], &proof["proof"].as_array().expect("siblings").len()), (&json!("1200"), &2));
    assert!(operator.refused(&["settle", "proof", &ANN.replace("a0001", "a0009")]).contains("has earned nothing"));
    assert_eq!(operator.json(&["ledger", "verify"])[0]["ok"], true);
    assert_eq!(operator.json(&["ledger", "balance", "application/shop"])[0]["available"], "996000");
    // What comes next goes on from there, and from nothing else.
    operator.earn(10..12);
    assert_eq!(operator.json(&["settle", "seal"])[0]["manifest"]["total"], "3360");
    let next = &operator.path("bundles/epoch-2.json");
    assert_eq!(operator.json(&["settle", "verify", next, "--previous", bundle])[0]["ok"], true);
    let refused = operator.refused(&["settle", "verify", next, "--previous", next]);
    assert!(refused.contains("epoch 2 does not follow epoch 2: its number is not the next"), "{refused}");

    for (what, says) in [
        ("ledger", "opens; 2 epochs sealed"),
        ("chain", ", 1 epochs final"),
        ("keystore", "may propose epochs"),
        ("anvil", "anvil/1.7.1/anvil"),
    ] {
        let (ok, detail) = operator.doctor(what);
        assert!(ok && detail.contains(says), "{what}: {detail}");
    }
}

#[test]
fn a_deployment_goes_on_and_what_cannot_be_right_is_refused_before_anything_is_sent() {
    let node = Node::start();
    let (mut operator, account) = Home::with_key();
    for what in ["ledger", "chain", "anvil"] {
        let (ok, detail) = operator.doctor(what);
        assert!(ok, "{what}: {detail}");
    }
    let deploy = |chain: &str, operator: &Home| {
        operator.refused(&["chain", "deploy", "--rpc", &node.url(), "--chain-id", chain])
    };
    let refused = deploy("10", &operator);
    assert!(refused.contains("is one of chain 31337, not of chain 10"), "{refused}");
    assert!(refused.contains("openlora doctor"), "{refused}");
    let refused = deploy("31337", &operator);
    assert!(refused.contains(&format!("{account} has 0 wei")) && refused.contains("openlora doctor"), "{refused}");
    assert_eq!(node.sent(&account), "0x0");

    node.give(&account, RICH);
    let deployed = node.deploy(&mut operator);
    let sent = node.sent(&account);
    assert_eq!(node.deploy(&mut operator), deployed);
    assert_eq!(node.sent(&account), sent, "deployed again, nothing is sent");

    operator.earn(0..2);
    operator.json(&["settle", "seal"]);
    operator.json(&["settle", "fund", "560", "--key", "first"]);
    let sent = node.sent(&account);
    for (contract, says) in [
        (deployed["token"].as_str().expect("an address"), "is not this release's RewardSettlement"),
        (ACME, "there is no contract at"),
    ] {
        operator.set("CONTRACT", contract);
        for args in [&["settle", "propose"][..], &["settle", "fund", "1", "--key", "second"]] {
            let refused = operator.refused(args);
            assert!(refused.contains(says) && refused.contains("openlora chain deploy"), "{refused}");
        }
        let (ok, detail) = operator.doctor("chain");
        assert!(!ok && detail.contains(says), "{detail}");
    }
    node.name(&mut operator, &deployed);
    operator.set("CHAIN_ID", "10");
    assert!(operator.refused(&["settle", "propose"]).contains("openlora doctor"));
    operator.set("CHAIN_ID", "31337");

    // Less than the bond.
    node.give(&account, "0x1");
    let refused = operator.refused(&["settle", "propose"]);
    assert!(refused.contains(&format!("{account} has 1 wei and may need 10000000000000000")), "{refused}");
    assert!(refused.contains("openlora doctor"), "{refused}");
    assert_eq!(node.sent(&account), sent);
    node.give(&account, RICH);

    // Somebody else's key, with the operator's bundles.
    let (mut stranger, other) = Home::with_key();
    node.name(&mut stranger, &deployed);
    stranger.set("BUNDLES_URL", &format!("file://{}", operator.path("bundles")));
    let (ok, detail) = stranger.doctor("keystore");
    assert!(!ok && detail.contains("0 wei"), "{detail}");
    node.give(&other, RICH);
    let (ok, detail) = stranger.doctor("keystore");
    assert!(ok && detail.contains("may not propose epochs"), "{detail}");
    let refused = stranger.refused(&["settle", "propose"]);
    let says = format!("{other} does not hold the role PROPOSER_ROLE");
    assert!(refused.contains(&says) && refused.contains("openlora doctor"), "{refused}");
    assert_eq!(node.sent(&other), "0x0");
    assert_eq!(operator.json(&["settle", "propose"])[0]["proposed"], true, "the operator may");

    let readable = fs::Permissions::from_mode(0o644);
    fs::set_permissions(stranger.path("key.json"), readable).expect("changed");
    let (ok, detail) = stranger.doctor("keystore");
    assert!(!ok && detail.contains("chmod 600"), "{detail}");
    stranger.set("RPC_URL", "http://127.0.0.1:1");
    let (ok, detail) = stranger.doctor("chain");
    assert!(!ok && detail.contains("http://127.0.0.1:1 gave no answer"), "{detail}");
    assert!(detail.contains("correct settlement.rpc_url"), "{detail}");
}

#[test]
fn a_wrong_root_is_reported_by_a_look_and_challenged_by_a_watch() {
    let node = Node::start();
    let (mut proposer, account) = Home::with_key();
    node.give(&account, RICH);
    let deployed = node.deploy(&mut proposer);
    let (mut watcher, other) = Home::with_key();
    node.give(&other, RICH);
    node.name(&mut watcher, &deployed);
    // The watcher's ledger has two requests, the proposer's has made up a third.
    watcher.earn(0..2);
    watcher.json(&["settle", "seal"]);
    assert_eq!(watcher.output(&["settle", "watch", "--once"]).status.code(), Some(0), "nothing is proposed");
    proposer.earn(0..3);
    proposer.json(&["settle", "seal"]);
    proposer.json(&["settle", "fund", "840", "--key", "first"]);
    proposer.json(&["settle", "propose"]);
    assert_eq!(proposer.output(&["settle", "watch", "--once"]).status.code(), Some(0), "so its own ledger says");

    let looked = watcher.output(&["settle", "watch", "--once"]);
    assert_eq!(looked.status.code(), Some(1));
    assert_eq!(lines(&looked)[0]["right"], false);
    assert_eq!(node.sent(&other), "0x0", "only reported");

    let mut status = watcher.command(&["--json", "settle", "status", "--watch"]);
    let mut status = Running(status.stdout(Stdio::piped()).spawn().expect("it starts"));
    let mut changes = status.stdout();
    assert_eq!(Running::next(&mut changes)["proposal"]["disputed"], false);
    let mut watch = watcher.command(&["--json", "settle", "watch", "--challenge"]);
    let mut watch = Running(watch.stdout(Stdio::piped()).spawn().expect("it starts"));
    assert_eq!(Running::next(&mut watch.stdout())["right"], false);
    assert_eq!(Running::next(&mut changes)["proposal"]["disputed"], true, "one line for one change");
    assert_eq!(status.interrupt(), Some(0));
    assert_eq!(node.sent(&other), "0x1", "one challenge");
    let refused = proposer.refused(&["settle", "finalize"]);
    assert!(refused.contains(&format!("is disputed by {other}")), "{refused}");
    assert_eq!(watcher.output(&["settle", "watch", "--once"]).status.code(), Some(0), "it waits for the arbiter");
}
