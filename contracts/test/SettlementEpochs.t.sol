// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IAccessControl} from "@openzeppelin/contracts/access/IAccessControl.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {BondVault} from "../src/BondVault.sol";
import {RewardSettlement} from "../src/RewardSettlement.sol";
import {SettlementTest} from "./support/SettlementTest.sol";
import {Refuser} from "./support/Tokens.sol";

/// An epoch's life: proposing, challenging, ruling, finalizing, and whose bond is whose.
contract SettlementEpochsTest is SettlementTest {
    bytes32 internal constant ROOT = keccak256("root");
    bytes32 internal constant OTHER = keccak256("other root");

    function test_an_unchallenged_proposal_is_finalized_after_its_window_and_its_bond_comes_back() public {
        vm.expectEmit(true, true, true, true, address(settlement));
        emit RewardSettlement.Proposed(
            1, ROOT, proposer, RECEIPTS, 1000, MANIFEST, BOND, uint64(block.timestamp + WINDOW)
        );
        propose(1, ROOT, 1000);
        assertStatus(RewardSettlement.Status.Pending);

        vm.expectRevert(
            abi.encodeWithSelector(
                RewardSettlement.ChallengeWindowOpen.selector, block.timestamp, block.timestamp + WINDOW
            )
        );
        settlement.finalize(1, ROOT);

        passWindow();
        vm.expectEmit(true, true, true, true, address(settlement));
        emit RewardSettlement.Finalized(1, ROOT, 1000);
        vm.prank(anyone);
        settlement.finalize(1, ROOT);
        vm.assertEq(settlement.finalizedRoot(1), ROOT);
        vm.assertEq(settlement.totals().finalized, 1000);
        vm.assertEq(settlement.totals().epoch, 1);
        assertStatus(RewardSettlement.Status.None);

        vm.prank(proposer);
        vm.assertEq(settlement.withdrawBond(payable(proposer)), BOND);
        vm.assertEq(proposer.balance, 100 ether);
        vm.assertEq(address(settlement).balance, 0);
    }

    function test_an_epoch_is_proposed_once_and_in_order() public {
        expectProposalRevert(abi.encodeWithSelector(RewardSettlement.WrongEpoch.selector, 0, 1), 0, ROOT, 1);
        expectProposalRevert(abi.encodeWithSelector(RewardSettlement.WrongEpoch.selector, 2, 1), 2, ROOT, 1);
        propose(1, ROOT, 1000);
        expectProposalRevert(abi.encodeWithSelector(RewardSettlement.ProposalOpen.selector, 1, ROOT), 1, ROOT, 1000);
        expectProposalRevert(abi.encodeWithSelector(RewardSettlement.ProposalOpen.selector, 1, ROOT), 2, OTHER, 1000);
        passWindow();
        settlement.finalize(1, ROOT);
        expectProposalRevert(abi.encodeWithSelector(RewardSettlement.WrongEpoch.selector, 1, 2), 1, ROOT, 1000);
        uint64 last = type(uint64).max;
        expectProposalRevert(abi.encodeWithSelector(RewardSettlement.WrongEpoch.selector, last, 2), last, ROOT, 1000);
        propose(2, OTHER, 1000);
    }

    function test_only_the_role_proposes() public {
        vm.deal(anyone, BOND);
        vm.expectRevert(
            abi.encodeWithSelector(
                IAccessControl.AccessControlUnauthorizedAccount.selector, anyone, settlement.PROPOSER_ROLE()
            )
        );
        vm.prank(anyone);
        settlement.propose{value: BOND}(1, ROOT, RECEIPTS, 1, MANIFEST);
    }

    function test_a_proposal_carries_exactly_the_bond() public {
        vm.expectRevert(abi.encodeWithSelector(BondVault.WrongBond.selector, BOND - 1, BOND));
        vm.prank(proposer);
        settlement.propose{value: BOND - 1}(1, ROOT, RECEIPTS, 1, MANIFEST);
        vm.expectRevert(abi.encodeWithSelector(BondVault.WrongBond.selector, BOND + 1, BOND));
        vm.prank(proposer);
        settlement.propose{value: BOND + 1}(1, ROOT, RECEIPTS, 1, MANIFEST);
    }

    function test_an_empty_tree_is_refused() public {
        expectProposalRevert(abi.encodeWithSelector(RewardSettlement.EmptyRoot.selector), 1, 0, 0);
    }

    function test_a_total_is_covered_and_never_decreases_and_never_overflows() public {
        expectProposalRevert(
            abi.encodeWithSelector(RewardSettlement.Insolvent.selector, FUNDS, FUNDS + 1), 1, ROOT, FUNDS + 1
        );
        uint256 max = type(uint112).max;
        expectProposalRevert(
            abi.encodeWithSelector(RewardSettlement.TotalTooLarge.selector, max + 1, max), 1, ROOT, max + 1
        );
        uint256 all = type(uint256).max;
        expectProposalRevert(abi.encodeWithSelector(RewardSettlement.TotalTooLarge.selector, all, max), 1, ROOT, all);

        settle(1, ROOT, FUNDS);
        expectProposalRevert(
            abi.encodeWithSelector(RewardSettlement.TotalDecreased.selector, FUNDS - 1, FUNDS), 2, OTHER, FUNDS - 1
        );
        token.mint(address(settlement), max - FUNDS);
        settle(2, OTHER, max);
        vm.assertEq(settlement.totals().finalized, max);
    }

    function test_solvency_is_looked_at_again_when_finalizing() public {
        propose(1, ROOT, FUNDS);
        passWindow();
        token.burn(address(settlement), 1);
        vm.expectRevert(abi.encodeWithSelector(RewardSettlement.Insolvent.selector, FUNDS - 1, FUNDS));
        settlement.finalize(1, ROOT);
        token.mint(address(settlement), 1);
        settlement.finalize(1, ROOT);
    }

    function test_a_proposal_that_cannot_be_finalized_is_cancelled_by_the_admin_alone() public {
        propose(1, ROOT, FUNDS);
        vm.expectPartialRevert(IAccessControl.AccessControlUnauthorizedAccount.selector);
        vm.prank(proposer);
        settlement.cancel(1, ROOT);

        vm.expectEmit(true, true, true, true, address(settlement));
        emit RewardSettlement.Rejected(1, ROOT, RewardSettlement.Rejection.Cancelled);
        vm.prank(admin);
        settlement.cancel(1, ROOT);
        vm.assertEq(settlement.bondCredit(proposer), BOND);
        propose(1, OTHER, 1000);
    }

    function test_a_disputed_proposal_can_be_neither_finalized_nor_cancelled_nor_challenged_again() public {
        propose(1, ROOT, 1000);
        challenge(1, ROOT);
        passWindow();
        bytes memory refused =
            abi.encodeWithSelector(RewardSettlement.NoSuchProposal.selector, 1, ROOT, RewardSettlement.Status.Pending);
        vm.expectRevert(refused);
        settlement.finalize(1, ROOT);
        vm.expectRevert(refused);
        vm.prank(admin);
        settlement.cancel(1, ROOT);
        vm.expectRevert(refused);
        vm.prank(challenger);
        settlement.challenge{value: BOND}(1, ROOT, 0);
    }

    function test_a_challenge_names_the_root_it_means_and_comes_in_time() public {
        propose(1, ROOT, 1000);
        vm.expectRevert(
            abi.encodeWithSelector(RewardSettlement.NoSuchProposal.selector, 1, OTHER, RewardSettlement.Status.Pending)
        );
        vm.prank(challenger);
        settlement.challenge{value: BOND}(1, OTHER, 0);
        vm.expectRevert(abi.encodeWithSelector(BondVault.WrongBond.selector, 0, BOND));
        vm.prank(challenger);
        settlement.challenge(1, ROOT, 0);

        vm.warp(block.timestamp + WINDOW - 1);
        challenge(1, ROOT);
        resolve(1, ROOT, false);
        vm.warp(block.timestamp + 1);
        vm.expectRevert(
            abi.encodeWithSelector(RewardSettlement.ChallengeWindowOver.selector, block.timestamp, block.timestamp)
        );
        vm.prank(challenger);
        settlement.challenge{value: BOND}(1, ROOT, 0);
    }

    function test_an_upheld_challenge_frees_the_epoch_and_half_the_bond_goes_to_the_challenger() public {
        propose(1, ROOT, 1000);
        challenge(1, ROOT);
        vm.expectEmit(true, true, true, true, address(settlement));
        emit RewardSettlement.Rejected(1, ROOT, RewardSettlement.Rejection.ChallengeUpheld);
        resolve(1, ROOT, true);
        vm.assertEq(settlement.bondCredit(challenger), uint256(BOND) + BOND / 2);
        vm.assertEq(settlement.bondCredit(admin), BOND / 2);
        vm.assertEq(settlement.bondCredit(proposer), 0);
        vm.assertEq(settlement.totals().epoch, 0);
        propose(1, OTHER, 1000);
    }

    function test_a_dismissed_challenge_costs_its_bond_and_leaves_the_window_as_it_was() public {
        uint256 finalizableAt = block.timestamp + WINDOW;
        propose(1, ROOT, 1000);
        challenge(1, ROOT);
        resolve(1, ROOT, false);
        vm.assertEq(settlement.bondCredit(proposer), BOND / 2);
        vm.assertEq(settlement.bondCredit(admin), BOND / 2);
        vm.assertEq(settlement.bondCredit(challenger), 0);
        vm.expectRevert(
            abi.encodeWithSelector(RewardSettlement.ChallengeWindowOpen.selector, block.timestamp, finalizableAt)
        );
        settlement.finalize(1, ROOT);
        // What is left of the window is open to others.
        challenge(1, ROOT);
        vm.warp(finalizableAt + 1);
        resolve(1, ROOT, false);
        settlement.finalize(1, ROOT);
        vm.assertEq(settlement.bondCredit(proposer), 2 * uint256(BOND));
    }

    function test_only_the_arbiter_rules_and_only_in_time() public {
        propose(1, ROOT, 1000);
        challenge(1, ROOT);
        vm.expectPartialRevert(IAccessControl.AccessControlUnauthorizedAccount.selector);
        vm.prank(proposer);
        settlement.resolve(1, ROOT, false);

        uint256 until = block.timestamp + ARBITRATION;
        vm.expectRevert(abi.encodeWithSelector(RewardSettlement.ArbitrationOpen.selector, block.timestamp, until));
        settlement.expire(1, ROOT);
        vm.warp(until);
        vm.expectRevert(abi.encodeWithSelector(RewardSettlement.ArbitrationOver.selector, until, until));
        vm.prank(arbiter);
        settlement.resolve(1, ROOT, false);
    }

    function test_an_absent_arbiter_stops_nothing_for_good() public {
        propose(1, ROOT, 1000);
        challenge(1, ROOT);
        vm.warp(block.timestamp + ARBITRATION);
        vm.prank(anyone);
        settlement.expire(1, ROOT);
        vm.assertEq(settlement.bondCredit(proposer), BOND);
        vm.assertEq(settlement.bondCredit(challenger), BOND);
        settle(1, OTHER, 1000);
    }

    function test_a_challenger_that_cannot_be_paid_blocks_nobody() public {
        Refuser refuser = new Refuser();
        vm.deal(address(refuser), BOND);
        propose(1, ROOT, 1000);
        refuser.perform(address(settlement), BOND, abi.encodeCall(settlement.challenge, (1, ROOT, 0)));
        resolve(1, ROOT, true);
        settle(1, OTHER, 1000);

        uint256 due = uint256(BOND) + BOND / 2;
        bytes memory withdraw = abi.encodeCall(settlement.withdrawBond, (payable(address(refuser))));
        vm.expectRevert(abi.encodeWithSelector(BondVault.BondTransferFailed.selector, address(refuser), due));
        refuser.perform(address(settlement), 0, withdraw);
        // It may name another receiver, or change its mind.
        refuser.setAccepts(true);
        refuser.perform(address(settlement), 0, withdraw);
        vm.assertEq(address(refuser).balance, due);
    }

    function test_bond_credit_is_withdrawn_once_and_to_whom_its_owner_says() public {
        settle(1, ROOT, 1000);
        vm.expectRevert(abi.encodeWithSelector(BondVault.NoBondCredit.selector, anyone));
        vm.prank(anyone);
        settlement.withdrawBond(payable(anyone));
        vm.expectRevert(abi.encodeWithSelector(BondVault.ZeroAddress.selector));
        vm.prank(proposer);
        settlement.withdrawBond(payable(address(0)));
        vm.prank(proposer);
        settlement.withdrawBond(payable(anyone));
        vm.assertEq(anyone.balance, BOND);
        vm.expectRevert(abi.encodeWithSelector(BondVault.NoBondCredit.selector, proposer));
        vm.prank(proposer);
        settlement.withdrawBond(payable(proposer));
    }

    function test_terms_change_for_proposals_to_come_only() public {
        propose(1, ROOT, 1000);
        vm.prank(admin);
        settlement.setTerms(RewardSettlement.Terms(5 ether, 7 days, 7 days));
        vm.assertEq(settlement.terms().bond, 5 ether);
        passWindow();
        settlement.finalize(1, ROOT);
        vm.assertEq(settlement.bondCredit(proposer), BOND);
        vm.expectRevert(abi.encodeWithSelector(BondVault.WrongBond.selector, BOND, 5 ether));
        vm.prank(proposer);
        settlement.propose{value: BOND}(2, OTHER, RECEIPTS, 1000, MANIFEST);
    }

    function test_terms_are_the_admins_and_bounded() public {
        vm.expectPartialRevert(IAccessControl.AccessControlUnauthorizedAccount.selector);
        vm.prank(proposer);
        settlement.setTerms(RewardSettlement.Terms(0, 1, 1));
        vm.startPrank(admin);
        vm.expectRevert(abi.encodeWithSelector(RewardSettlement.WindowOutOfRange.selector, 0, 1, 30 days));
        settlement.setTerms(RewardSettlement.Terms(0, 0, 1));
        vm.expectRevert(abi.encodeWithSelector(RewardSettlement.WindowOutOfRange.selector, 30 days + 1, 1, 30 days));
        settlement.setTerms(RewardSettlement.Terms(0, 1, 30 days + 1));
        vm.stopPrank();
    }

    function test_only_excess_is_recovered_while_a_root_is_open_or_final() public {
        propose(1, ROOT, FUNDS - 10);
        expectExcess(10);
        challenge(1, ROOT);
        expectExcess(10);
        resolve(1, ROOT, true);
        expectExcess(FUNDS);
        settle(1, ROOT, FUNDS - 20);
        expectExcess(20);
        vm.prank(admin);
        settlement.recoverExcess(IERC20(address(token)), admin, 20);
        expectExcess(0);
        vm.assertEq(token.balanceOf(admin), 20);
        vm.expectPartialRevert(IAccessControl.AccessControlUnauthorizedAccount.selector);
        vm.prank(proposer);
        settlement.recoverExcess(IERC20(address(token)), proposer, 0);
    }

    function test_coins_sent_without_a_call_are_refused() public {
        (bool sent,) = address(settlement).call{value: 1}("");
        vm.assertFalse(sent, "nothing takes coins that are no bond");
    }

    function test_a_deployment_without_token_or_admin_is_refused() public {
        RewardSettlement.Terms memory terms = RewardSettlement.Terms(BOND, WINDOW, ARBITRATION);
        vm.expectRevert(abi.encodeWithSelector(BondVault.ZeroAddress.selector));
        new RewardSettlement(IERC20(address(0)), admin, proposer, arbiter, terms);
        vm.expectRevert(abi.encodeWithSelector(BondVault.ZeroAddress.selector));
        new RewardSettlement(IERC20(address(token)), address(0), proposer, arbiter, terms);
        RewardSettlement bare = new RewardSettlement(IERC20(address(token)), admin, address(0), address(0), terms);
        vm.assertFalse(bare.hasRole(bare.PROPOSER_ROLE(), address(0)), "the zero address holds no role");
        vm.assertFalse(bare.hasRole(bare.DEFAULT_ADMIN_ROLE(), address(this)), "the deployer holds no role");
    }

    function testFuzz_forfeited_bonds_are_shared_out_to_the_last_wei(uint96 bond, bool upheld) public {
        vm.prank(admin);
        settlement.setTerms(RewardSettlement.Terms(bond, WINDOW, ARBITRATION));
        vm.deal(proposer, bond);
        vm.deal(challenger, bond);
        vm.prank(proposer);
        settlement.propose{value: bond}(1, ROOT, RECEIPTS, 1000, MANIFEST);
        vm.prank(challenger);
        settlement.challenge{value: bond}(1, ROOT, 0);
        resolve(1, ROOT, upheld);
        passWindow();
        if (!upheld) settlement.finalize(1, ROOT);
        uint256 credits =
            settlement.bondCredit(proposer) + settlement.bondCredit(challenger) + settlement.bondCredit(admin);
        vm.assertEq(credits, 2 * uint256(bond));
        vm.assertEq(settlement.bondCredit(admin), uint256(bond) - bond / 2);
    }

    function expectExcess(uint256 excess) private {
        vm.assertEq(settlement.excess(), excess);
        vm.assertEq(settlement.liabilities(), token.balanceOf(address(settlement)) - excess);
        vm.expectRevert(abi.encodeWithSelector(RewardSettlement.ExceedsExcess.selector, excess + 1, excess));
        vm.prank(admin);
        settlement.recoverExcess(IERC20(address(token)), admin, excess + 1);
    }

    function expectProposalRevert(bytes memory reason, uint64 epoch, bytes32 root, uint256 total) private {
        vm.expectRevert(reason);
        vm.prank(proposer);
        settlement.propose{value: BOND}(epoch, root, RECEIPTS, total, MANIFEST);
    }

    function assertStatus(RewardSettlement.Status expected) private view {
        vm.assertEq(uint256(status()), uint256(expected));
    }
}
