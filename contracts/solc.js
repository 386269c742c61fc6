#!/usr/bin/env node
// The compiler as forge wants it: an executable that answers `--version` and compiles standard JSON from its input.
// It is the pinned npm package `solc` (the compiler itself, in WebAssembly), so nothing else has to be fetched.
"use strict";
const solc = require("solc");

const args = process.argv.slice(2);
if (args.includes("--version")) {
  process.stdout.write(`solc, the solidity compiler commandline interface\nVersion: ${solc.version()}\n`);
} else if (args.includes("--standard-json")) {
  const input = require("node:fs").readFileSync(0, "utf8");
  // forge sends every source inline; an import that is not among them is an error, never a look at the disk.
  process.stdout.write(solc.compile(input, { import: (path) => ({ error: `${path} was not given` }) }));
} else {
  process.stderr.write("usage: solc.js --version | --standard-json < input.json\n");
  process.exitCode = 2;
}
