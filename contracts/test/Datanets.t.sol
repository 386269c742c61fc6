// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IAccessControl} from "@openzeppelin/contracts/access/IAccessControl.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {BondVault} from "../src/BondVault.sol";
import {DatanetRegistry} from "../src/DatanetRegistry.sol";
import {Test} from "./support/Test.sol";
import {OddToken, Refuser} from "./support/Tokens.sol";
import {Tree} from "./support/Tree.sol";

/// Datanets: who may write what, what is frozen, what a dispute costs whom.
contract DatanetsTest is Test {
    uint96 private constant BOND = 1 ether;
    uint32 private constant ARBITRATION = 3 days;
    uint32 private constant DELAY = 7 days;
    bytes32 private constant LICENCE = keccak256("CC-BY-4.0");
    bytes32 private constant METADATA = keccak256("metadata");
    bytes32 private constant ROOT = keccak256("root");

    address private admin = address(0xad);
    address private arbiter = address(0xa6);
    address private owner = address(0x0e);
    address private disputer = address(0xd1);
    address private anyone = address(0xee);

    OddToken private token;
    DatanetRegistry private registry;
    uint64 private datanet;

    function setUp() public {
        vm.warp(1_800_000_000);
        token = new OddToken();
        registry = new DatanetRegistry(
            IERC20(address(token)), admin, arbiter, DatanetRegistry.Terms(BOND, ARBITRATION, DELAY)
        );
        vm.prank(owner);
        datanet = registry.createDatanet(LICENCE, METADATA);
        token.mint(owner, 1000);
        vm.prank(owner);
        token.approve(address(registry), type(uint256).max);
        vm.deal(disputer, 10 ether);
    }

    function test_datanets_are_numbered_from_one_and_owned_by_who_opened_them() public {
        vm.assertEq(datanet, 1);
        vm.expectEmit(true, true, true, true, address(registry));
        emit DatanetRegistry.DatanetCreated(2, anyone, LICENCE, METADATA);
        vm.prank(anyone);
        vm.assertEq(registry.createDatanet(LICENCE, METADATA), 2);
        vm.assertEq(registry.getDatanet(1).owner, owner);
        vm.assertEq(registry.getDatanet(1).licenceHash, LICENCE);
        vm.assertEq(registry.getDatanet(3).owner, address(0));
    }

    function test_only_the_owner_describes_and_hands_over() public {
        bytes memory refused = abi.encodeWithSelector(DatanetRegistry.NotOwner.selector, datanet, anyone);
        vm.startPrank(anyone);
        vm.expectRevert(refused);
        registry.describe(datanet, 0, 0);
        vm.expectRevert(refused);
        registry.offerOwnership(datanet, anyone);
        vm.expectRevert(refused);
        registry.setCommitter(datanet, anyone, true);
        vm.expectRevert(refused);
        registry.requestUnstake(datanet, 0);
        vm.expectRevert(refused);
        registry.unstake(datanet, anyone);
        vm.expectRevert(refused);
        registry.takeSnapshot(datanet, 1, ROOT, METADATA, 1);
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.NotNextOwner.selector, datanet, anyone));
        registry.acceptOwnership(datanet);
        vm.stopPrank();

        vm.startPrank(owner);
        registry.describe(datanet, keccak256("CC0"), keccak256("more"));
        registry.offerOwnership(datanet, anyone);
        vm.stopPrank();
        vm.assertEq(registry.getDatanet(datanet).owner, owner);
        vm.prank(anyone);
        registry.acceptOwnership(datanet);
        vm.assertEq(registry.getDatanet(datanet).owner, anyone);
        vm.assertEq(registry.getDatanet(datanet).licenceHash, keccak256("CC0"));
        // An offer is used up.
        vm.prank(anyone);
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.NotNextOwner.selector, datanet, anyone));
        registry.acceptOwnership(datanet);
    }

    function test_batches_are_numbered_without_gaps_and_a_root_is_committed_once() public {
        vm.expectEmit(true, true, true, true, address(registry));
        emit DatanetRegistry.BatchCommitted(datanet, 1, ROOT, 3, owner);
        commit(1, ROOT);
        expectCommitRevert(abi.encodeWithSelector(DatanetRegistry.WrongBatch.selector, 1, 2), 1, ROOT, 3);
        expectCommitRevert(abi.encodeWithSelector(DatanetRegistry.WrongBatch.selector, 3, 2), 3, ROOT, 3);
        expectCommitRevert(abi.encodeWithSelector(DatanetRegistry.RootAlreadyCommitted.selector, ROOT, 1), 2, ROOT, 3);
        expectCommitRevert(abi.encodeWithSelector(DatanetRegistry.EmptyRoot.selector), 2, 0, 3);
        expectCommitRevert(abi.encodeWithSelector(DatanetRegistry.EmptyBatch.selector), 2, keccak256("two"), 0);
        commit(2, keccak256("two"));
        vm.assertEq(registry.batchOfRoot(datanet, ROOT), 1);
        vm.assertEq(registry.getBatch(datanet, 2).committedAt, block.timestamp);
    }

    function test_committers_commit_until_they_no_longer_may() public {
        bytes memory refused = abi.encodeWithSelector(DatanetRegistry.NotCommitter.selector, datanet, anyone);
        vm.prank(anyone);
        vm.expectRevert(refused);
        registry.commitBatch(datanet, 1, ROOT, 3);
        vm.prank(owner);
        registry.setCommitter(datanet, anyone, true);
        vm.prank(anyone);
        registry.commitBatch(datanet, 1, ROOT, 3);
        vm.prank(owner);
        registry.setCommitter(datanet, anyone, false);
        vm.prank(anyone);
        vm.expectRevert(refused);
        registry.commitBatch(datanet, 2, keccak256("two"), 3);
    }

    function test_a_contribution_is_shown_to_be_committed_by_its_proof() public {
        bytes32[] memory leaves = new bytes32[](3);
        for (uint256 i = 0; i < 3; ++i) {
            leaves[i] = registry.contributionLeaf(datanet, address(uint160(i + 1)), bytes32(i));
        }
        commit(1, Tree.root(leaves));
        bytes32[] memory proof = Tree.proof(leaves, 1);
        uint256 time = block.timestamp;
        vm.warp(time + 1 days);
        vm.assertEq(registry.committedAt(datanet, 1, address(2), bytes32(uint256(1)), 1, proof), time);
        vm.assertEq(registry.committedAt(datanet, 1, address(3), bytes32(uint256(1)), 1, proof), 0);
        vm.assertEq(registry.committedAt(datanet, 1, address(2), bytes32(uint256(2)), 1, proof), 0);
        vm.assertEq(registry.committedAt(datanet, 1, address(2), bytes32(uint256(1)), 0, proof), 0);
        vm.assertEq(registry.committedAt(datanet, 2, address(2), bytes32(uint256(1)), 1, proof), 0);
    }

    function test_leaves_beyond_the_count_are_not_committed() public {
        bytes32[] memory leaves = new bytes32[](2);
        leaves[0] = registry.contributionLeaf(datanet, address(1), 0);
        leaves[1] = registry.contributionLeaf(datanet, address(2), 0);
        vm.prank(owner);
        registry.commitBatch(datanet, 1, Tree.root(leaves), 1);
        vm.assertEq(registry.committedAt(datanet, 1, address(1), 0, 0, Tree.proof(leaves, 0)), block.timestamp);
        vm.assertEq(registry.committedAt(datanet, 1, address(2), 0, 1, Tree.proof(leaves, 1)), 0);
    }

    function test_snapshots_are_numbered_without_gaps_and_name_batches_that_are_there() public {
        commit(1, ROOT);
        expectSnapshotRevert(abi.encodeWithSelector(DatanetRegistry.WrongSnapshot.selector, 2, 1), 2, ROOT, 1);
        expectSnapshotRevert(abi.encodeWithSelector(DatanetRegistry.EmptyRoot.selector), 1, 0, 1);
        expectSnapshotRevert(abi.encodeWithSelector(DatanetRegistry.BatchNotThere.selector, 2, 1), 1, ROOT, 2);
        expectSnapshotRevert(abi.encodeWithSelector(DatanetRegistry.BatchNotThere.selector, 0, 1), 1, ROOT, 0);
        vm.prank(owner);
        registry.takeSnapshot(datanet, 1, ROOT, METADATA, 1);
        vm.assertEq(registry.getSnapshot(datanet, 1).root, ROOT);
        vm.assertEq(registry.getSnapshot(datanet, 1).throughBatch, 1);
        expectSnapshotRevert(abi.encodeWithSelector(DatanetRegistry.WrongSnapshot.selector, 1, 2), 1, ROOT, 1);
    }

    function test_stake_leaves_after_its_delay_and_not_while_disputed() public {
        stake(1000);
        commit(1, ROOT);
        vm.startPrank(owner);
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.NothingToWithdraw.selector, datanet));
        registry.unstake(datanet, owner);
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.ExceedsStake.selector, 1001, 1000));
        registry.requestUnstake(datanet, 1001);
        registry.requestUnstake(datanet, 400);
        uint256 due = block.timestamp + DELAY;
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.UnstakeNotDue.selector, block.timestamp, due));
        registry.unstake(datanet, owner);
        vm.stopPrank();
        vm.warp(due);
        dispute(1);
        vm.prank(owner);
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.DisputesOpen.selector, datanet, 1));
        registry.unstake(datanet, owner);
        vm.prank(arbiter);
        registry.resolve(datanet, 1, disputer, false, 0);
        vm.prank(owner);
        vm.assertEq(registry.unstake(datanet, anyone), 400);
        vm.assertEq(token.balanceOf(anyone), 400);
        vm.assertEq(registry.getDatanet(datanet).stake, 600);
    }

    function test_what_arrives_is_what_is_staked() public {
        token.setFee(100);
        vm.prank(owner);
        vm.assertEq(registry.stake(datanet, 1000), 900);
        vm.assertEq(registry.getDatanet(datanet).stake, 900);
        vm.prank(owner);
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.NothingReceived.selector));
        registry.stake(datanet, 0);
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.UnknownDatanet.selector, 9));
        registry.stake(9, 1);
    }

    function test_a_stake_over_128_bits_is_refused() public {
        stake(1000);
        token.mint(owner, type(uint128).max);
        vm.prank(owner);
        vm.expectRevert(
            abi.encodeWithSelector(
                DatanetRegistry.StakeTooLarge.selector, uint256(type(uint128).max) + 1000, type(uint128).max
            )
        );
        registry.stake(datanet, type(uint128).max);
    }

    function test_an_upheld_dispute_rejects_the_batch_and_slashes_what_the_arbiter_says() public {
        stake(1000);
        commit(1, ROOT);
        vm.prank(owner);
        registry.requestUnstake(datanet, 900);
        dispute(1);
        vm.prank(arbiter);
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.ExceedsStake.selector, 1001, 1000));
        registry.resolve(datanet, 1, disputer, true, 1001);
        vm.prank(arbiter);
        registry.resolve(datanet, 1, disputer, true, 301);
        assertState(1, DatanetRegistry.BatchState.Rejected);
        vm.assertEq(registry.getDatanet(datanet).stake, 699);
        vm.assertEq(registry.getDatanet(datanet).unstaking, 699);
        vm.assertEq(registry.slashCredit(disputer), 150);
        vm.assertEq(registry.slashCredit(admin), 151);
        vm.assertEq(registry.bondCredit(disputer), BOND);
        vm.prank(disputer);
        registry.withdrawSlash(anyone);
        vm.assertEq(token.balanceOf(anyone), 150);
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.NoSlashCredit.selector, disputer));
        vm.prank(disputer);
        registry.withdrawSlash(anyone);
        // For good: it is neither disputed again nor committed again.
        expectDisputeRevert(1, DatanetRegistry.BatchState.Rejected);
        expectCommitRevert(abi.encodeWithSelector(DatanetRegistry.RootAlreadyCommitted.selector, ROOT, 1), 2, ROOT, 3);
    }

    function test_a_dismissed_dispute_costs_its_bond_and_slashes_nothing() public {
        stake(1000);
        commit(1, ROOT);
        dispute(1);
        vm.prank(arbiter);
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.ExceedsStake.selector, 1, 0));
        registry.resolve(datanet, 1, disputer, false, 1);
        vm.prank(arbiter);
        registry.resolve(datanet, 1, disputer, false, 0);
        assertState(1, DatanetRegistry.BatchState.Committed);
        vm.assertEq(registry.bondCredit(admin), BOND);
        vm.assertEq(registry.bondCredit(disputer), 0);
        vm.assertEq(registry.getDatanet(datanet).stake, 1000);
    }

    function test_an_absent_arbiter_leaves_the_batch_and_gives_the_bond_back() public {
        commit(1, ROOT);
        dispute(1);
        uint256 until = block.timestamp + ARBITRATION;
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.ArbitrationOpen.selector, block.timestamp, until));
        registry.expire(datanet, 1);
        vm.warp(until);
        vm.prank(arbiter);
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.ArbitrationOver.selector, until, until));
        registry.resolve(datanet, 1, disputer, true, 0);
        registry.expire(datanet, 1);
        assertState(1, DatanetRegistry.BatchState.Committed);
        vm.assertEq(registry.bondCredit(disputer), BOND);
        vm.assertEq(registry.getDatanet(datanet).openDisputes, 0);
    }

    function test_a_ruling_meets_the_dispute_it_was_made_for() public {
        commit(1, ROOT);
        dispute(1);
        vm.prank(arbiter);
        vm.expectPartialRevert(DatanetRegistry.WrongDisputer.selector);
        registry.resolve(datanet, 1, anyone, true, 0);
        vm.prank(anyone);
        vm.expectPartialRevert(IAccessControl.AccessControlUnauthorizedAccount.selector);
        registry.resolve(datanet, 1, disputer, true, 0);
        expectDisputeRevert(1, DatanetRegistry.BatchState.Disputed);
        expectDisputeRevert(2, DatanetRegistry.BatchState.None);
        commit(2, keccak256("two"));
        vm.expectRevert(abi.encodeWithSelector(BondVault.WrongBond.selector, 0, BOND));
        registry.dispute(datanet, 2, 0);
    }

    function test_a_disputer_that_cannot_be_paid_blocks_nobody() public {
        stake(1000);
        commit(1, ROOT);
        Refuser refuser = new Refuser();
        vm.deal(address(refuser), BOND);
        refuser.perform(address(registry), BOND, abi.encodeCall(registry.dispute, (datanet, 1, 0)));
        token.setBlocked(address(refuser), true);
        vm.prank(arbiter);
        registry.resolve(datanet, 1, address(refuser), true, 100);
        vm.assertEq(registry.bondCredit(address(refuser)), BOND);
        refuser.perform(address(registry), 0, abi.encodeCall(registry.withdrawSlash, (anyone)));
        vm.assertEq(token.balanceOf(anyone), 50);
    }

    function test_terms_are_the_admins_and_bounded() public {
        vm.expectPartialRevert(IAccessControl.AccessControlUnauthorizedAccount.selector);
        registry.setTerms(DatanetRegistry.Terms(0, 1, 0));
        vm.startPrank(admin);
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.WindowOutOfRange.selector, 0, 1, 30 days));
        registry.setTerms(DatanetRegistry.Terms(0, 0, 0));
        vm.expectRevert(abi.encodeWithSelector(DatanetRegistry.WindowOutOfRange.selector, 30 days + 1, 0, 30 days));
        registry.setTerms(DatanetRegistry.Terms(0, 1, 30 days + 1));
        registry.setTerms(DatanetRegistry.Terms(7, 8, 9));
        vm.stopPrank();
        vm.assertEq(registry.terms().bond, 7);
    }

    function test_a_token_that_calls_back_takes_no_stake_twice() public {
        stake(1000);
        vm.startPrank(owner);
        registry.requestUnstake(datanet, 1000);
        vm.warp(block.timestamp + DELAY);
        // The token becomes the owner, so that nothing but the guard is in its way.
        registry.offerOwnership(datanet, address(token));
        vm.stopPrank();
        vm.prank(address(token));
        registry.acceptOwnership(datanet);
        token.setCall(address(registry), abi.encodeCall(registry.unstake, (datanet, anyone)));
        vm.prank(address(token));
        registry.unstake(datanet, anyone);
        vm.assertFalse(token.calleeSucceeded(), "no way in while paying");
        vm.assertEq(token.balanceOf(anyone), 1000);
    }

    /// What arrives is measured as a difference of balances; a stake inside of a stake would count twice.
    function test_a_token_that_calls_back_counts_no_stake_twice() public {
        token.mint(address(token), 100);
        vm.prank(address(token));
        token.approve(address(registry), 100);
        token.setCall(address(registry), abi.encodeCall(registry.stake, (datanet, 100)));
        stake(100);
        vm.assertFalse(token.calleeSucceeded(), "no way in while staking");
        vm.assertEq(registry.getDatanet(datanet).stake, 100);
        vm.assertEq(token.balanceOf(address(registry)), 100);
    }

    function commit(uint32 batch, bytes32 root) private {
        vm.prank(owner);
        registry.commitBatch(datanet, batch, root, 3);
    }

    function stake(uint256 amount) private {
        vm.prank(owner);
        registry.stake(datanet, amount);
    }

    function dispute(uint32 batch) private {
        vm.prank(disputer);
        registry.dispute{value: BOND}(datanet, batch, keccak256("evidence"));
    }

    function expectDisputeRevert(uint32 batch, DatanetRegistry.BatchState state) private {
        vm.expectRevert(
            abi.encodeWithSelector(
                DatanetRegistry.WrongBatchState.selector, batch, state, DatanetRegistry.BatchState.Committed
            )
        );
        dispute(batch);
    }

    function expectCommitRevert(bytes memory reason, uint32 batch, bytes32 root, uint32 count) private {
        vm.prank(owner);
        vm.expectRevert(reason);
        registry.commitBatch(datanet, batch, root, count);
    }

    function expectSnapshotRevert(bytes memory reason, uint32 snapshot, bytes32 root, uint32 throughBatch) private {
        vm.prank(owner);
        vm.expectRevert(reason);
        registry.takeSnapshot(datanet, snapshot, root, METADATA, throughBatch);
    }

    function assertState(uint32 batch, DatanetRegistry.BatchState expected) private view {
        vm.assertEq(uint256(registry.getBatch(datanet, batch).state), uint256(expected));
    }
}
