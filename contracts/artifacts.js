#!/usr/bin/env node
// Writes abi/<Name>.json from what forge compiled: all that somebody needs who deploys or calls a contract and has no compiler.
//   node artifacts.js          writes them
//   node artifacts.js --check  fails where a committed one differs
"use strict";
const fs = require("node:fs");
const path = require("node:path");
const { keccak_256 } = require("@noble/hashes/sha3");

const NAMES = ["OpenToken", "TimelockController", "OpenGovernor", "RewardSettlement", "DatanetRegistry", "ModelRegistry"];

function sorted(value) {
  if (Array.isArray(value)) return value.map(sorted);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.keys(value).sort().map((key) => [key, sorted(value[key])]));
}

/// See docs/contracts.md for the fields.
function artifactOf(name) {
  const compiled = JSON.parse(fs.readFileSync(path.join(__dirname, "out", `${name}.sol`, `${name}.json`), "utf8"));
  const { bytecode, deployedBytecode, abi } = compiled;
  for (const code of [bytecode, deployedBytecode]) {
    if (Object.keys(code.linkReferences).length !== 0) throw new Error(`${name} has to be linked with a library`);
  }
  const deployed = Buffer.from(deployedBytecode.object.slice(2), "hex");
  const { compiler, settings } = compiled.metadata;
  return sorted({
    abi,
    bytecode: bytecode.object,
    // The compiler leaves immutables zero; on the chain they hold a value, so whoever compares has to zero them first.
    deployedBytecodeHash: "0x" + Buffer.from(keccak_256(deployed)).toString("hex"),
    deployedBytecodeLength: deployed.length,
    evmVersion: settings.evmVersion,
    immutableReferences: Object.values(deployedBytecode.immutableReferences ?? {})
      .flat()
      .sort((a, b) => a.start - b.start),
    name,
    optimizerRuns: settings.optimizer.runs,
    solc: compiler.version,
  });
}

const checking = process.argv.includes("--check");
const folder = path.join(__dirname, "abi");
fs.mkdirSync(folder, { recursive: true });
const wanted = new Map(NAMES.map((name) => [`${name}.json`, JSON.stringify(artifactOf(name), null, 1) + "\n"]));
const stale = fs.readdirSync(folder).filter((file) => !wanted.has(file));
for (const [file, text] of wanted) {
  const at = path.join(folder, file);
  if (!checking) fs.writeFileSync(at, text);
  else if (!fs.existsSync(at) || fs.readFileSync(at, "utf8") !== text) stale.push(file);
}
if (stale.length > 0) {
  process.stderr.write(`contracts/abi is not what the sources compile to: ${stale.join(", ")}; run: contracts/build.sh\n`);
  process.exitCode = 1;
}
