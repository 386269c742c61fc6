#!/usr/bin/env node
// Writes merkle.json: trees, proofs and signing digests computed by an implementation that shares nothing with the contracts or
// with the Rust code but the description in docs/contracts.md. Both are tested against it.
//   node generate.js          writes it (the tree of 2^20 leaves takes a minute or two)
//   node generate.js --check  fails where the committed one differs, the large tree aside
"use strict";
const fs = require("node:fs");
const path = require("node:path");
const { keccak_256 } = require("@noble/hashes/sha3");

const CHAIN_ID = 31337n;
const SETTLEMENT = "0x00000000000000000000000000000000005e771e";
const REGISTRY = "0x000000000000000000000000000000000da7a0e7";
const TOKEN = "0x0000000000000000000000000000000000070ce0";

const hex = (bytes) => "0x" + Buffer.from(bytes).toString("hex");
const keccak = (bytes) => Buffer.from(keccak_256(bytes));
const text = (string) => keccak(Buffer.from(string, "utf8"));
// One ABI word: integers and addresses to the right of 32 bytes, big-endian.
const word = (value) => Buffer.from(BigInt(value).toString(16).padStart(64, "0"), "hex");
const address = (value) => "0x" + BigInt(value).toString(16).padStart(40, "0");

const LEAF_DOMAIN = text("OpenLoRA.RewardSettlement.Leaf.v1");
const CONTRIBUTION_DOMAIN = text("OpenLoRA.DatanetRegistry.Contribution.v1");
const CLAIM_TYPE = "Claim(address account,address recipient,uint256 cumulative,uint256 nonce,uint256 deadline)";
const DOMAIN_TYPE = "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)";

const doubled = (...words) => keccak(keccak(Buffer.concat(words)));
const payoutLeaf = (account, cumulative) =>
  doubled(LEAF_DOMAIN, word(CHAIN_ID), word(SETTLEMENT), word(account), word(TOKEN), word(cumulative));
const contributionLeaf = (datanet, contributor, content) =>
  doubled(CONTRIBUTION_DOMAIN, word(CHAIN_ID), word(REGISTRY), word(datanet), word(contributor), content);

/// Levels from the leaves up to the root; the first is padded with zero words to a power of two.
function tree(leaves) {
  let size = 1;
  while (size < leaves.length) size *= 2;
  const padded = leaves.concat(Array(size - leaves.length).fill(Buffer.alloc(32)));
  const levels = [padded];
  while (levels.at(-1).length > 1) {
    const below = levels.at(-1);
    const above = [];
    for (let i = 0; i < below.length; i += 2) above.push(keccak(Buffer.concat([below[i], below[i + 1]])));
    levels.push(above);
  }
  return levels;
}

const proofOf = (levels, index) => levels.slice(0, -1).map((level, depth) => level[(index >> depth) ^ 1]);

/// Everything about one tree; proofs for all leaves, or for those named.
function described(leaves, indices = leaves.map((_, i) => i)) {
  const levels = tree(leaves);
  return {
    depth: levels.length - 1,
    root: hex(levels.at(-1)[0]),
    proofs: indices.map((index) => ({ index, leaf: hex(leaves[index]), proof: proofOf(levels, index).map(hex) })),
  };
}

const E18 = 10n ** 18n;
const MAX = (1n << 112n) - 1n;
const ALICE = "0x1111111111111111111111111111111111111111";
const BOB = "0x2222222222222222222222222222222222222222";
const counted = (n, amount) => Array.from({ length: n }, (_, i) => [address((BigInt(i) + 1n) << 96n), amount(BigInt(i))]);

const PAYOUTS = [
  ["one account", [[ALICE, 5n * E18]]],
  ["two accounts", [[ALICE, 1n], [BOB, 2n]]],
  ["three accounts, one padding leaf", [[address(1), E18], [ALICE, 0n], ["0x" + "f".repeat(40), 7n]]],
  ["the largest amount", [[ALICE, MAX], [BOB, 0n]]],
  ["five accounts, three padding leaves", counted(5, (i) => (i + 1n) * E18)],
  ["eight accounts, no padding", counted(8, (i) => i * i)],
  ["seventeen accounts", counted(17, (i) => E18 / (i + 1n))],
];

const payouts = PAYOUTS.map(([name, entries]) => ({
  name,
  accounts: entries.map(([account]) => account),
  cumulative: entries.map(([, cumulative]) => cumulative.toString()),
  ...described(entries.map(([account, cumulative]) => payoutLeaf(account, cumulative))),
}));

const file = path.join(__dirname, "merkle.json");
const checking = process.argv.includes("--check");
const committed = fs.existsSync(file) ? fs.readFileSync(file, "utf8") : "{}";

const LARGE = 1 << 20;
const computeLarge = () => ({
  name: "2^20 accounts",
  rule: "leaf i: account i + 1, cumulative (i + 1) * 10^12",
  count: LARGE,
  ...described(
    Array.from({ length: LARGE }, (_, i) => payoutLeaf(i + 1, BigInt(i + 1) * 10n ** 12n)),
    [0, 1, 699050, LARGE - 1],
  ),
});

const CONTENTS = ["a", "b", "c"].map(text);
const contributions = {
  registry: REGISTRY,
  datanet: 7,
  contributors: [ALICE, BOB, ALICE],
  contents: CONTENTS.map(hex),
  ...described(CONTENTS.map((content, i) => contributionLeaf(7, [ALICE, BOB, ALICE][i], content))),
};

const domainSeparator = keccak(
  Buffer.concat([text(DOMAIN_TYPE), text("OpenLoRA RewardSettlement"), text("1"), word(CHAIN_ID), word(SETTLEMENT)]),
);
const authorization = { account: ALICE, recipient: BOB, cumulative: (5n * E18).toString(), nonce: 3, deadline: 1900000000 };
const structHash = keccak(
  Buffer.concat([text(CLAIM_TYPE), ...["account", "recipient", "cumulative", "nonce", "deadline"].map((k) => word(authorization[k]))]),
);

const vectors = {
  chainId: Number(CHAIN_ID),
  settlement: SETTLEMENT,
  token: TOKEN,
  leafDomain: hex(LEAF_DOMAIN),
  contributionDomain: hex(CONTRIBUTION_DOMAIN),
  payouts,
  large: checking ? JSON.parse(committed).large : computeLarge(),
  contributions,
  claimFor: {
    typeHash: hex(text(CLAIM_TYPE)),
    domainSeparator: hex(domainSeparator),
    ...authorization,
    digest: hex(keccak(Buffer.concat([Buffer.from("1901", "hex"), domainSeparator, structHash]))),
  },
};

const written = JSON.stringify(vectors, null, 1) + "\n";
if (!checking) fs.writeFileSync(file, written);
else if (committed !== written) {
  process.stderr.write(`${file} is not what its generator writes; run: node contracts/test/vectors/generate.js\n`);
  process.exitCode = 1;
}
