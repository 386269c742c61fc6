// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {RewardSettlement} from "../src/RewardSettlement.sol";
import {SettlementHandler} from "./support/SettlementHandler.sol";
import {Test} from "./support/Test.sol";
import {OddToken} from "./support/Tokens.sol";

/// What stays true whatever the parties do, in whatever order.
contract SettlementInvariantsTest is Test {
    OddToken private token;
    RewardSettlement private settlement;
    SettlementHandler private handler;

    function setUp() public {
        vm.warp(1_800_000_000);
        token = new OddToken();
        address admin = address(0xad);
        address proposer = address(0xb0);
        address arbiter = address(0xa6);
        settlement = new RewardSettlement(
            IERC20(address(token)), admin, proposer, arbiter, RewardSettlement.Terms(1 ether, 1 hours, 2 hours)
        );
        handler = new SettlementHandler(settlement, token, admin, proposer, arbiter);
    }

    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    function invariant_claimed_is_at_most_finalized_is_at_most_deposited() public view {
        RewardSettlement.Totals memory totals = settlement.totals();
        vm.assertLe(totals.claimed, totals.finalized, "claimed <= finalized");
        vm.assertLe(totals.finalized, handler.deposited() - handler.recovered(), "finalized <= deposited");
    }

    function invariant_every_unit_is_here_paid_or_recovered() public view {
        vm.assertEq(
            token.balanceOf(address(settlement)),
            handler.deposited() - handler.recovered() - handler.paidTotal(),
            "balance"
        );
        vm.assertEq(settlement.totals().claimed, handler.paidTotal(), "claimed");
    }

    function invariant_what_is_owed_is_here() public view {
        vm.assertGe(token.balanceOf(address(settlement)), settlement.liabilities(), "solvent");
    }

    function invariant_an_account_has_what_it_was_paid_and_never_more_than_a_final_leaf_says() public view {
        for (uint256 i = 0; i < handler.ACCOUNTS(); ++i) {
            vm.assertEq(settlement.claimed(handler.accountAt(i)), handler.paid(i), "claimed only grows, by payments");
            vm.assertLe(handler.paid(i), handler.promised(i), "paid <= promised");
        }
    }

    function invariant_an_epoch_is_finalized_once_and_in_order() public view {
        uint64 epoch = settlement.totals().epoch;
        vm.assertEq(epoch, handler.finalizations());
        for (uint64 e = 1; e <= epoch; ++e) {
            vm.assertTrue(settlement.finalizedRoot(e) != 0, "final");
        }
        vm.assertEq(settlement.finalizedRoot(epoch + 1), 0);
        RewardSettlement.Proposal memory open = settlement.proposal();
        if (open.status != RewardSettlement.Status.None) vm.assertEq(open.epoch, epoch + 1);
    }

    function invariant_bonds_are_conserved() public view {
        vm.assertEq(address(settlement).balance, handler.bondsIn() - handler.bondsOut(), "in less out");
        uint256 owed = 0;
        for (uint256 i = 0; i < 6; ++i) {
            owed += settlement.bondCredit(handler.parties(i));
        }
        RewardSettlement.Proposal memory open = settlement.proposal();
        if (open.status == RewardSettlement.Status.Pending) owed += open.bond;
        if (open.status == RewardSettlement.Status.Disputed) owed += 2 * uint256(open.bond);
        vm.assertEq(address(settlement).balance, owed, "every wei is somebody's");
    }

    function invariant_nothing_happened_that_must_not() public view {
        vm.assertEq(keccak256(bytes(handler.violation())), keccak256(""), handler.violation());
    }

    /// The steps above are no empty ones: a long walk does each of them, with money moving, and all of it holds at the end.
    function test_a_walk_of_two_thousand_steps_does_everything() public {
        bytes4[14] memory steps = [
            handler.fund.selector,
            handler.propose.selector,
            handler.challenge.selector,
            handler.resolve.selector,
            handler.expire.selector,
            handler.cancel.selector,
            handler.finalize.selector,
            handler.claim.selector,
            handler.claimBatch.selector,
            handler.claimEarly.selector,
            handler.recoverExcess.selector,
            handler.setTerms.selector,
            handler.withdrawBond.selector,
            handler.wait.selector
        ];
        for (uint256 i = 0; i < 2000; ++i) {
            uint256 r = uint256(keccak256(abi.encode(i)));
            // Eight words serve as the arguments of any step; their bytes are drawn anew for each.
            bytes memory words = abi.encode(r, r >> 8, r >> 16, r >> 24, r >> 32, r >> 40, r >> 48, r >> 56);
            bytes4 step = steps[(r >> 192) % 14];
            if (step == handler.challenge.selector) words = abi.encode(address(uint160(r)));
            if (step == handler.resolve.selector) words = abi.encode(r & 1024 == 0);
            if (step == handler.claim.selector) words = abi.encode(r >> 8, r & 1024 == 0);
            if (step == handler.setTerms.selector) words = abi.encode(uint96(r));
            (bool ok,) = address(handler).call(bytes.concat(step, words));
            vm.assertTrue(ok, "a step failed");
        }
        for (uint256 i = 0; i < steps.length; ++i) {
            vm.assertGe(handler.done(steps[i]), 1, vm.toString(uint256(uint32(steps[i]))));
        }
        vm.assertGe(handler.finalizations(), 20, "epochs");
        vm.assertGe(handler.paidTotal(), 1, "payments");
        invariant_claimed_is_at_most_finalized_is_at_most_deposited();
        invariant_every_unit_is_here_paid_or_recovered();
        invariant_what_is_owed_is_here();
        invariant_an_account_has_what_it_was_paid_and_never_more_than_a_final_leaf_says();
        invariant_an_epoch_is_finalized_once_and_in_order();
        invariant_bonds_are_conserved();
        invariant_nothing_happened_that_must_not();
    }
}
