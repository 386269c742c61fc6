// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {RewardSettlement} from "../src/RewardSettlement.sol";
import {SettlementTest} from "./support/SettlementTest.sol";
import {OddToken, Wallet} from "./support/Tokens.sol";
import {Tree} from "./support/Tree.sol";

/// Tokens that misbehave: nothing is lost, nothing is paid twice, nobody else is stopped.
contract SettlementTokensTest is SettlementTest {
    uint256[] private amounts;

    function setUp() public override {
        super.setUp();
        amounts = amounts3(100, 200, 300);
        settleAmounts(1, amounts);
    }

    function test_a_transfer_that_returns_false_is_no_payment() public {
        token.setReturnsFalse(true);
        RewardSettlement.Claim memory entry = entryOf(1, amounts, 0);
        vm.expectRevert(abi.encodeWithSelector(SafeERC20.SafeERC20FailedOperation.selector, address(token)));
        settlement.claim(entry);
        vm.assertEq(settlement.claimBatch(all()), 0);
        assertNothingHappened();
        token.setReturnsFalse(false);
        vm.assertEq(settlement.claimBatch(all()), 600);
    }

    function test_a_token_that_returns_nothing_pays() public {
        token.setReturnsNothing(true);
        settlement.claim(entryOf(1, amounts, 0));
        vm.assertEq(token.balanceOf(accountAt(0)), 100);
    }

    function test_a_blocked_account_keeps_its_claim_and_can_send_it_elsewhere() public {
        token.setBlocked(accountAt(1), true);
        RewardSettlement.Claim memory entry = entryOf(1, amounts, 1);
        vm.expectRevert(abi.encodeWithSelector(OddToken.Blocked.selector, accountAt(1)));
        settlement.claim(entry);
        vm.assertEq(settlement.claimBatch(all()), 400);
        vm.prank(accountAt(1));
        settlement.claimTo(entry, anyone);
        vm.assertEq(token.balanceOf(anyone), 200);
    }

    function test_a_fee_falls_on_who_is_paid_and_not_on_the_others() public {
        token.setFee(100);
        vm.assertEq(settlement.claimBatch(all()), 600);
        vm.assertEq(token.balanceOf(accountAt(0)), 90);
        vm.assertEq(token.balanceOf(accountAt(2)), 270);
        vm.assertEq(token.balanceOf(address(settlement)), FUNDS - 600);
        // What is put in arrives short, and only what arrived can be promised.
        token.mint(address(this), 100);
        vm.assertTrue(token.transfer(address(settlement), 100), "transferred");
        vm.expectRevert(
            abi.encodeWithSelector(RewardSettlement.Insolvent.selector, FUNDS - 600 + 90, FUNDS - 600 + 100)
        );
        vm.prank(proposer);
        settlement.propose{value: BOND}(2, keccak256("root"), RECEIPTS, FUNDS + 100, MANIFEST);
    }

    function test_a_token_that_calls_back_enters_nowhere() public {
        bytes32 root = Tree.root(leavesOf(amounts));
        propose(2, root, 600);
        passWindow();
        bytes[] memory calls = new bytes[](3);
        calls[0] = abi.encodeCall(settlement.claim, (entryOf(1, amounts, 1)));
        calls[1] = abi.encodeCall(settlement.claimBatch, (all()));
        calls[2] = abi.encodeCall(settlement.finalize, (2, root));
        for (uint256 i = 0; i < calls.length; ++i) {
            token.setCall(address(settlement), calls[i]);
            settlement.claim(entryOf(1, amounts, i));
            vm.assertFalse(token.calleeSucceeded(), "no way in while paying");
        }
        vm.assertEq(settlement.totals().claimed, 600);
        vm.assertEq(token.balanceOf(accountAt(0)), 100);
        vm.assertEq(uint256(status()), uint256(RewardSettlement.Status.Pending));
    }

    function test_a_token_that_calls_back_enters_nowhere_from_the_other_ways_to_be_paid() public {
        Wallet wallet = new Wallet();
        settle(2, settlement.leafHash(address(wallet), 500), 1200);
        RewardSettlement.Claim memory entry = RewardSettlement.Claim(2, address(wallet), 500, 0, new bytes32[](0));
        wallet.acceptAll();
        token.setCall(address(settlement), abi.encodeCall(settlement.claim, (entryOf(1, amounts, 1))));
        settlement.claimFor(entry, anyone, block.timestamp, "");
        vm.assertFalse(token.calleeSucceeded(), "no way in from claimFor");

        entry = entryOf(1, amounts, 0);
        vm.prank(accountAt(0));
        settlement.claimTo(entry, anyone);
        vm.assertFalse(token.calleeSucceeded(), "no way in from claimTo");

        vm.prank(admin);
        settlement.recoverExcess(IERC20(address(token)), anyone, 1);
        vm.assertFalse(token.calleeSucceeded(), "no way in from recoverExcess");
        vm.assertEq(token.balanceOf(anyone), 601);
        vm.assertEq(settlement.claimed(accountAt(1)), 0);
    }

    /// In the middle of a payment the balance still holds what is already counted as claimed: a proposal then would pass
    /// as covered that is not.
    function test_a_token_with_the_proposers_role_cannot_propose_while_it_pays() public {
        bytes32 role = settlement.PROPOSER_ROLE();
        vm.startPrank(admin);
        settlement.grantRole(role, address(token));
        settlement.setTerms(RewardSettlement.Terms(0, WINDOW, ARBITRATION));
        vm.stopPrank();
        token.setCall(
            address(settlement), abi.encodeCall(settlement.propose, (2, keccak256("root"), 0, FUNDS + 100, 0))
        );
        settlement.claim(entryOf(1, amounts, 0));
        vm.assertFalse(token.calleeSucceeded(), "the balance is not looked at in the middle of a payment");
        vm.assertEq(uint256(status()), uint256(RewardSettlement.Status.None));
    }

    function test_a_token_with_the_admins_role_cannot_recover_what_it_is_paying() public {
        bytes32 role = settlement.DEFAULT_ADMIN_ROLE();
        vm.prank(admin);
        settlement.grantRole(role, address(token));
        token.setCall(
            address(settlement), abi.encodeCall(settlement.recoverExcess, (IERC20(address(token)), anyone, 100))
        );
        settlement.claim(entryOf(1, amounts, 0));
        vm.assertFalse(token.calleeSucceeded(), "the balance is not looked at in the middle of a payment");
        vm.assertEq(token.balanceOf(anyone), 0);
    }

    function test_tokens_that_came_by_mistake_are_recovered() public {
        OddToken other = new OddToken();
        other.mint(address(settlement), 77);
        vm.prank(admin);
        settlement.recoverExcess(IERC20(address(other)), anyone, 77);
        vm.assertEq(other.balanceOf(anyone), 77);
    }

    function all() private view returns (RewardSettlement.Claim[] memory entries) {
        entries = new RewardSettlement.Claim[](3);
        for (uint256 i = 0; i < 3; ++i) {
            entries[i] = entryOf(1, amounts, i);
        }
    }

    function assertNothingHappened() private view {
        vm.assertEq(settlement.totals().claimed, 0);
        vm.assertEq(token.balanceOf(address(settlement)), FUNDS);
        for (uint256 i = 0; i < 3; ++i) {
            vm.assertEq(settlement.claimed(accountAt(i)), 0);
        }
    }
}
