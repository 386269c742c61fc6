// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {OpenToken} from "../src/OpenToken.sol";
import {RewardSettlement} from "../src/RewardSettlement.sol";
import {Test} from "./support/Test.sol";
import {Tree} from "./support/Tree.sol";

/// What settlement costs, in a tree of 131,072 accounts. Every call is a transaction of its own (`isolate`), so all storage
/// is cold. Each is recorded twice in snapshots/gas.json, which is committed and compared: as the transaction that somebody
/// pays, and as the call alone, without the transaction's 21,000 and its calldata. `propose` and a
/// batch are limited as transactions, single claims as calls.
/// forge-config: default.isolate = true
contract GasTest is Test {
    uint256 private constant DEPTH = 17;
    /// The accounts of a batch stand side by side at the beginning of a subtree of this depth.
    uint256 private constant BATCH = 50;
    uint256 private constant BATCH_DEPTH = 6;

    OpenToken private token;
    RewardSettlement private settlement;

    function setUp() public {
        vm.warp(1_800_000_000);
        token = new OpenToken(address(this), 1e27);
        settlement = new RewardSettlement(
            IERC20(address(token)), address(1), address(this), address(2), RewardSettlement.Terms(1 ether, 1, 1)
        );
        vm.assertTrue(token.transfer(address(settlement), 1e26), "funded");
        vm.deal(address(this), 100 ether);
    }

    function test_proposing_costs_at_most_160k_whatever_the_epoch_holds() public {
        propose(1, keccak256("one"), 1e24);
        vm.assertLe(record("propose, first epoch ever"), 160_000, "first epoch ever");
        vm.warp(block.timestamp + 1);
        settlement.finalize(1, keccak256("one"));
        record("finalize, first epoch ever");
        propose(2, keccak256("two"), 2e24);
        vm.assertLe(record("propose"), 160_000, "later epochs");
        vm.warp(block.timestamp + 1);
        settlement.finalize(2, keccak256("two"));
        record("finalize");
    }

    function test_a_first_claim_costs_at_most_95k_and_later_ones_60k() public {
        RewardSettlement.Claim[] memory entries = settle(1, 100e18);
        settlement.claim(entries[21]);
        (, uint256 first) =
            recordCall("claim, first, to who held no tokens", abi.encodeCall(settlement.claim, entries[21]));
        vm.assertLe(first, 95_000, "first claim");

        entries = settle(2, 223e18);
        settlement.claim(entries[21]);
        (, uint256 later) = recordCall("claim, later", abi.encodeCall(settlement.claim, entries[21]));
        vm.assertLe(later, 60_000, "later claims");
        vm.assertEq(token.balanceOf(entries[21].account), 223e18);
    }

    function test_a_batch_of_50_costs_at_most_40k_for_each_that_was_paid_before() public {
        RewardSettlement.Claim[] memory entries = settle(1, 100e18);
        vm.assertEq(settlement.claimBatch(entries), BATCH * 100e18);
        recordCall("batch of 50, first, to who held no tokens", abi.encodeCall(settlement.claimBatch, entries));

        entries = settle(2, 223e18);
        vm.assertEq(settlement.claimBatch(entries), BATCH * 123e18);
        (uint256 later,) = recordCall("batch of 50, later", abi.encodeCall(settlement.claimBatch, entries));
        vm.assertLe(later, 40_000 * BATCH, "batch of later claims");
    }

    /// Settles an epoch in which the accounts of a batch have earned `cumulative` each, and gives their claims.
    function settle(uint64 epoch, uint256 cumulative) private returns (RewardSettlement.Claim[] memory entries) {
        bytes32[] memory leaves = new bytes32[](BATCH);
        for (uint256 i = 0; i < BATCH; ++i) {
            leaves[i] = settlement.leafHash(accountAt(i), cumulative);
        }
        bytes32 root = Tree.root(leaves);
        for (uint256 level = BATCH_DEPTH; level < DEPTH; ++level) {
            root = keccak256(abi.encode(root, sibling(level)));
        }
        propose(epoch, root, epoch * 1e25);
        vm.warp(block.timestamp + 1);
        settlement.finalize(epoch, root);

        entries = new RewardSettlement.Claim[](BATCH);
        for (uint256 i = 0; i < BATCH; ++i) {
            bytes32[] memory proof = new bytes32[](DEPTH);
            bytes32[] memory lower = Tree.proof(leaves, i);
            for (uint256 level = 0; level < DEPTH; ++level) {
                proof[level] = level < BATCH_DEPTH ? lower[level] : sibling(level);
            }
            entries[i] = RewardSettlement.Claim(epoch, accountAt(i), cumulative, i, proof);
        }
    }

    function propose(uint64 epoch, bytes32 root, uint256 total) private {
        settlement.propose{value: 1 ether}(epoch, root, keccak256("receipts"), total, keccak256("manifest"));
    }

    /// Like addresses of people, with few zero bytes.
    function accountAt(uint256 i) private pure returns (address) {
        return address(uint160(uint256(keccak256(abi.encode("account", i)))));
    }

    function sibling(uint256 level) private pure returns (bytes32) {
        return keccak256(abi.encode("sibling", level));
    }

    function record(string memory name) private returns (uint256 transaction) {
        return vm.snapshotGasLastCall("gas", string.concat(name, ": transaction"));
    }

    function recordCall(string memory name, bytes memory data) private returns (uint256 transaction, uint256 call) {
        transaction = record(name);
        call = transaction - 21_000;
        for (uint256 i = 0; i < data.length; ++i) {
            call -= data[i] == 0 ? 4 : 16;
        }
        vm.snapshotValue("gas", string.concat(name, ": call"), call);
    }
}
