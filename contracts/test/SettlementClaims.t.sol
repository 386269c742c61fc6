// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20Errors} from "@openzeppelin/contracts/interfaces/draft-IERC6093.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {RewardSettlement} from "../src/RewardSettlement.sol";
import {IndexedMerkle} from "../src/libraries/IndexedMerkle.sol";
import {SettlementTest} from "./support/SettlementTest.sol";
import {Wallet} from "./support/Tokens.sol";
import {Tree} from "./support/Tree.sol";

/// Who is paid what, from which root, and who is not.
contract SettlementClaimsTest is SettlementTest {
    uint256 private constant KEY = 0xa11ce;

    function test_an_account_is_paid_the_difference_to_what_it_was_paid_before() public {
        uint256[] memory first = amounts3(100, 200, 300);
        settleAmounts(1, first);
        vm.expectEmit(true, true, true, true, address(settlement));
        emit RewardSettlement.Claimed(accountAt(1), 1, accountAt(1), 200, 200);
        vm.prank(anyone);
        vm.assertEq(settlement.claim(entryOf(1, first, 1)), 200);
        vm.assertEq(token.balanceOf(accountAt(1)), 200);
        vm.assertEq(settlement.totals().claimed, 200);

        uint256[] memory second = amounts3(100, 250, 300);
        settleAmounts(2, second);
        vm.assertEq(settlement.claim(entryOf(2, second, 1)), 50);
        // Who skipped an epoch loses nothing.
        vm.assertEq(settlement.claim(entryOf(2, second, 2)), 300);
        vm.assertEq(settlement.claimed(accountAt(1)), 250);
        vm.assertEq(settlement.liabilities(), 100);
    }

    function test_nothing_is_paid_twice() public {
        uint256[] memory amounts = amounts3(100, 200, 300);
        settleAmounts(1, amounts);
        settlement.claim(entryOf(1, amounts, 0));
        expectClaimRevert(
            abi.encodeWithSelector(RewardSettlement.NothingToClaim.selector, 100, 100), entryOf(1, amounts, 0)
        );
    }

    function test_a_pending_or_disputed_root_pays_nothing_and_the_last_final_one_still_does() public {
        uint256[] memory first = amounts3(100, 200, 300);
        uint256[] memory second = amounts3(500, 600, 700);
        bytes32 root = Tree.root(leavesOf(second));
        RewardSettlement.Claim memory early = entryOf(2, second, 0);
        expectClaimRevert(abi.encodeWithSelector(RewardSettlement.EpochNotClaimable.selector, 2, 0), early);
        settleAmounts(1, first);

        propose(2, root, 1800);
        expectClaimRevert(abi.encodeWithSelector(RewardSettlement.EpochNotClaimable.selector, 2, 1), early);
        settlement.claim(entryOf(1, first, 0));
        challenge(2, root);
        expectClaimRevert(abi.encodeWithSelector(RewardSettlement.EpochNotClaimable.selector, 2, 1), early);
        settlement.claim(entryOf(1, first, 1));
        resolve(2, root, true);
        expectClaimRevert(abi.encodeWithSelector(RewardSettlement.EpochNotClaimable.selector, 2, 1), early);
        settlement.claim(entryOf(1, first, 2));
        vm.assertEq(token.balanceOf(accountAt(0)) + token.balanceOf(accountAt(1)), 300);
    }

    function test_a_claim_on_its_way_survives_one_new_epoch_and_not_two() public {
        uint256[] memory first = amounts3(100, 200, 300);
        uint256[] memory second = amounts3(110, 210, 310);
        settleAmounts(1, first);
        RewardSettlement.Claim memory onItsWay = entryOf(1, first, 0);
        settleAmounts(2, second);
        vm.assertEq(settlement.claim(onItsWay), 100);
        vm.assertEq(settlement.claim(entryOf(2, second, 0)), 10);
        settleAmounts(3, second);
        expectClaimRevert(
            abi.encodeWithSelector(RewardSettlement.EpochNotClaimable.selector, 1, 3), entryOf(1, first, 1)
        );
    }

    function test_epoch_zero_and_the_largest_number_are_not_claimable() public {
        uint256[] memory amounts = amounts3(1, 2, 3);
        settleAmounts(1, amounts);
        uint64 max = type(uint64).max;
        expectClaimRevert(
            abi.encodeWithSelector(RewardSettlement.EpochNotClaimable.selector, 0, 1), entryOf(0, amounts, 0)
        );
        expectClaimRevert(
            abi.encodeWithSelector(RewardSettlement.EpochNotClaimable.selector, max, 1), entryOf(max, amounts, 0)
        );
    }

    function test_the_only_account_claims_with_an_empty_proof() public {
        uint256[] memory amounts = new uint256[](1);
        amounts[0] = FUNDS;
        settleAmounts(1, amounts);
        RewardSettlement.Claim memory entry = entryOf(1, amounts, 0);
        vm.assertEq(entry.proof.length, 0);
        vm.assertEq(settlement.claim(entry), FUNDS);
    }

    function test_another_amount_account_place_or_proof_is_refused() public {
        uint256[] memory amounts = amounts3(100, 200, 300);
        settleAmounts(1, amounts);
        RewardSettlement.Claim memory entry = entryOf(1, amounts, 1);
        entry.cumulative = 201;
        expectInvalidProof(entry);
        entry = entryOf(1, amounts, 1);
        entry.account = accountAt(2);
        expectInvalidProof(entry);
        entry = entryOf(1, amounts, 1);
        entry.index = 0;
        expectInvalidProof(entry);
        entry = entryOf(1, amounts, 1);
        entry.proof[1] = keccak256("other");
        expectInvalidProof(entry);
        entry = entryOf(1, amounts, 1);
        entry.proof = new bytes32[](0);
        entry.index = 0;
        expectInvalidProof(entry);
        entry = entryOf(1, amounts, 1);
        entry.index = 5;
        expectClaimRevert(abi.encodeWithSelector(IndexedMerkle.IndexOutsideTree.selector, 5, 2), entry);
        entry.proof = new bytes32[](33);
        expectClaimRevert(abi.encodeWithSelector(IndexedMerkle.ProofTooLong.selector, 33, 32), entry);
    }

    function test_a_proof_made_for_another_deployment_or_chain_is_refused() public {
        uint256[] memory amounts = amounts3(100, 200, 300);
        RewardSettlement.Claim memory entry = entryOf(1, amounts, 1);
        bytes32 root = Tree.root(leavesOf(amounts));
        settle(1, root, 600);
        vm.chainId(10);
        expectInvalidProof(entry);
        vm.chainId(31337);

        settlement = new RewardSettlement(
            IERC20(address(token)), admin, proposer, arbiter, RewardSettlement.Terms(BOND, WINDOW, ARBITRATION)
        );
        token.mint(address(settlement), FUNDS);
        settle(1, root, 600);
        expectInvalidProof(entry);
    }

    function test_an_account_that_stands_twice_in_a_tree_gets_its_larger_leaf_and_not_the_sum() public {
        bytes32[] memory leaves = new bytes32[](2);
        leaves[0] = settlement.leafHash(accountAt(0), 100);
        leaves[1] = settlement.leafHash(accountAt(0), 150);
        settle(1, Tree.root(leaves), 250);
        settlement.claim(RewardSettlement.Claim(1, accountAt(0), 100, 0, Tree.proof(leaves, 0)));
        vm.assertEq(settlement.claim(RewardSettlement.Claim(1, accountAt(0), 150, 1, Tree.proof(leaves, 1))), 50);
        expectClaimRevert(
            abi.encodeWithSelector(RewardSettlement.NothingToClaim.selector, 100, 150),
            RewardSettlement.Claim(1, accountAt(0), 100, 0, Tree.proof(leaves, 0))
        );
    }

    function test_leaves_that_sum_to_more_than_the_total_pay_no_more_than_the_total() public {
        uint256[] memory amounts = amounts3(100, 200, 300);
        settle(1, Tree.root(leavesOf(amounts)), 350);
        settlement.claim(entryOf(1, amounts, 2));
        expectClaimRevert(
            abi.encodeWithSelector(RewardSettlement.ExceedsFinalized.selector, 100, 50), entryOf(1, amounts, 0)
        );
        vm.assertEq(settlement.totals().claimed, 300);
    }

    function test_the_largest_total_is_paid_and_larger_leaves_are_not() public {
        uint256 max = type(uint112).max;
        token.mint(address(settlement), max - FUNDS);
        uint256[] memory amounts = amounts3(max, type(uint256).max, max + 1);
        settle(1, Tree.root(leavesOf(amounts)), max);
        uint256 all = type(uint256).max;
        expectClaimRevert(
            abi.encodeWithSelector(RewardSettlement.ExceedsFinalized.selector, all, max), entryOf(1, amounts, 1)
        );
        expectClaimRevert(
            abi.encodeWithSelector(RewardSettlement.ExceedsFinalized.selector, max + 1, max), entryOf(1, amounts, 2)
        );
        vm.assertEq(settlement.claim(entryOf(1, amounts, 0)), max);
        vm.assertEq(settlement.totals().claimed, max);
        vm.assertEq(settlement.liabilities(), 0);
    }

    function test_the_zero_address_is_paid_nothing() public {
        bytes32 leaf = settlement.leafHash(address(0), 100);
        settle(1, leaf, 100);
        RewardSettlement.Claim memory entry = RewardSettlement.Claim(1, address(0), 100, 0, new bytes32[](0));
        vm.expectPartialRevert(IERC20Errors.ERC20InvalidReceiver.selector);
        settlement.claim(entry);
        // Nor does a signature that recovers to nobody count as the zero address's.
        vm.expectRevert(abi.encodeWithSelector(RewardSettlement.SignatureInvalid.selector, address(0)));
        settlement.claimFor(entry, anyone, block.timestamp, new bytes(65));
        vm.assertEq(settlement.totals().claimed, 0);
    }

    function test_a_leaf_of_nothing_claims_nothing() public {
        uint256[] memory amounts = amounts3(0, 0, 1);
        settleAmounts(1, amounts);
        expectClaimRevert(
            abi.encodeWithSelector(RewardSettlement.NothingToClaim.selector, 0, 0), entryOf(1, amounts, 0)
        );
    }

    function test_the_account_itself_sends_its_claim_elsewhere_and_nobody_else_can() public {
        uint256[] memory amounts = amounts3(100, 200, 300);
        settleAmounts(1, amounts);
        RewardSettlement.Claim memory entry = entryOf(1, amounts, 0);
        vm.expectRevert(abi.encodeWithSelector(RewardSettlement.NotTheAccount.selector, anyone, accountAt(0)));
        vm.prank(anyone);
        settlement.claimTo(entry, anyone);
        vm.prank(accountAt(0));
        settlement.claimTo(entry, address(0xcafe));
        vm.assertEq(token.balanceOf(address(0xcafe)), 100);
        vm.assertEq(settlement.claimed(accountAt(0)), 100);
    }

    function test_a_signed_claim_goes_where_the_signature_says_and_once() public {
        (RewardSettlement.Claim memory entry,) = settleFor(vm.addr(KEY), 500);
        bytes memory signature = sign(entry, address(0xcafe), 0, block.timestamp);
        vm.prank(anyone);
        settlement.claimFor(entry, address(0xcafe), block.timestamp, signature);
        vm.assertEq(token.balanceOf(address(0xcafe)), 500);
        vm.assertEq(settlement.nonces(vm.addr(KEY)), 1);
        vm.expectRevert(abi.encodeWithSelector(RewardSettlement.SignatureInvalid.selector, entry.account));
        settlement.claimFor(entry, address(0xcafe), block.timestamp, signature);
    }

    function test_a_signature_of_another_expired_altered_or_revoked_is_refused() public {
        (RewardSettlement.Claim memory entry,) = settleFor(vm.addr(KEY), 500);
        uint256 deadline = block.timestamp;
        bytes memory signature = sign(entry, address(0xcafe), 0, deadline);
        bytes memory invalid = abi.encodeWithSelector(RewardSettlement.SignatureInvalid.selector, entry.account);
        vm.expectRevert(invalid);
        settlement.claimFor(entry, address(0xbad), deadline, signature);
        vm.expectRevert(invalid);
        settlement.claimFor(entry, address(0xcafe), deadline + 1, signature);
        vm.expectRevert(invalid);
        settlement.claimFor(entry, address(0xcafe), deadline, hex"1234");
        signature[64] ^= 0x01;
        vm.expectRevert(invalid);
        settlement.claimFor(entry, address(0xcafe), deadline, signature);
        signature[64] ^= 0x01;

        vm.warp(deadline + 1);
        vm.expectRevert(abi.encodeWithSelector(RewardSettlement.SignatureExpired.selector, deadline + 1, deadline));
        settlement.claimFor(entry, address(0xcafe), deadline, signature);
        vm.warp(deadline);

        vm.prank(entry.account);
        settlement.revokeSignature();
        vm.expectRevert(invalid);
        settlement.claimFor(entry, address(0xcafe), deadline, signature);
        vm.assertEq(settlement.claimed(entry.account), 0);
    }

    function test_a_contract_account_is_paid_and_signs_by_its_own_rule() public {
        Wallet wallet = new Wallet();
        (RewardSettlement.Claim memory entry, bytes32 root) = settleFor(address(wallet), 500);
        vm.expectRevert(abi.encodeWithSelector(RewardSettlement.SignatureInvalid.selector, address(wallet)));
        settlement.claimFor(entry, anyone, block.timestamp, "");
        wallet.accept(digest(entry, anyone, 0, block.timestamp));
        settlement.claimFor(entry, anyone, block.timestamp, "");
        vm.assertEq(token.balanceOf(anyone), 500);

        settle(2, root, 1000);
        bytes32 leaf = settlement.leafHash(address(wallet), 800);
        settle(3, leaf, 1000);
        settlement.claim(RewardSettlement.Claim(3, address(wallet), 800, 0, new bytes32[](0)));
        vm.assertEq(token.balanceOf(address(wallet)), 300);
    }

    function test_a_batch_pays_what_can_be_paid_and_says_what_it_skipped() public {
        uint256[] memory amounts = amounts3(100, 200, 300);
        settleAmounts(1, amounts);
        RewardSettlement.Claim[] memory entries = new RewardSettlement.Claim[](5);
        entries[0] = entryOf(1, amounts, 0);
        entries[1] = entryOf(1, amounts, 1);
        entries[1].cumulative = 999;
        entries[2] = entryOf(1, amounts, 0);
        entries[3] = entryOf(9, amounts, 1);
        entries[4] = entryOf(1, amounts, 2);
        token.setBlocked(accountAt(2), true);

        expectSkipped(entries[1], RewardSettlement.InvalidProof.selector);
        expectSkipped(entries[2], RewardSettlement.NothingToClaim.selector);
        expectSkipped(entries[3], RewardSettlement.EpochNotClaimable.selector);
        expectSkipped(entries[4], bytes4(keccak256("Blocked(address)")));
        vm.assertEq(settlement.claimBatch(entries), 100);
        vm.assertEq(settlement.totals().claimed, 100);
        vm.assertEq(settlement.claimed(accountAt(2)), 0);

        token.setBlocked(accountAt(2), false);
        vm.assertEq(settlement.claimBatch(entries), 300);
    }

    function test_a_batch_is_bounded_and_its_entries_cannot_be_called_from_outside() public {
        RewardSettlement.Claim[] memory entries = new RewardSettlement.Claim[](201);
        vm.expectRevert(abi.encodeWithSelector(RewardSettlement.BatchTooLarge.selector, 201, 200));
        settlement.claimBatch(entries);
        vm.assertEq(settlement.claimBatch(new RewardSettlement.Claim[](0)), 0);
        vm.expectRevert(abi.encodeWithSelector(RewardSettlement.NotTheAccount.selector, anyone, address(settlement)));
        vm.prank(anyone);
        settlement.claimInBatch(entries[0]);
    }

    function testFuzz_every_account_of_any_tree_gets_exactly_its_leaf(uint256[] memory amounts, uint256 seed) public {
        vm.assume(amounts.length > 0);
        uint256 count = bound(amounts.length, 1, 40);
        uint256[] memory kept = new uint256[](count);
        uint256 total = 0;
        for (uint256 i = 0; i < count; ++i) {
            kept[i] = amounts[i % amounts.length] % (FUNDS / 40);
            total += kept[i];
        }
        settleAmounts(1, kept);
        uint256 start = seed % count;
        for (uint256 k = 0; k < count; ++k) {
            uint256 i = (start + k) % count;
            if (kept[i] == 0) continue;
            vm.assertEq(settlement.claim(entryOf(1, kept, i)), kept[i]);
            vm.assertEq(token.balanceOf(accountAt(i)), kept[i]);
        }
        vm.assertEq(settlement.totals().claimed, total);
        vm.assertEq(settlement.liabilities(), 0);
    }

    function testFuzz_no_claim_but_a_leafs_own_is_paid(address account, uint256 cumulative, uint8 index, uint8 depth)
        public
    {
        uint256[] memory amounts = amounts3(100, 200, 300);
        settleAmounts(1, amounts);
        uint256 place = uint256(uint160(account)) - (uint160(account) < 0x1001 ? 0 : 0x1001);
        bool isLeaf = uint160(account) >= 0x1001 && place < 3 && cumulative == amounts[place];
        vm.assume(!isLeaf);
        RewardSettlement.Claim memory entry = entryOf(1, amounts, index % 3);
        bytes32[] memory proof = new bytes32[](depth % 34);
        for (uint256 i = 0; i < proof.length; ++i) {
            proof[i] = i < 2 ? entry.proof[i] : bytes32(0);
        }
        entry = RewardSettlement.Claim(1, account, cumulative, index, proof);
        (bool paid,) = address(settlement).call(abi.encodeCall(settlement.claim, (entry)));
        vm.assertFalse(paid, "only leaves are paid");
        vm.assertEq(settlement.totals().claimed, 0);
    }

    function settleFor(address account, uint256 amount)
        private
        returns (RewardSettlement.Claim memory entry, bytes32 root)
    {
        root = settlement.leafHash(account, amount);
        settle(1, root, amount);
        entry = RewardSettlement.Claim(1, account, amount, 0, new bytes32[](0));
    }

    function digest(RewardSettlement.Claim memory entry, address recipient, uint256 nonce, uint256 deadline)
        private
        view
        returns (bytes32)
    {
        bytes32 structHash = keccak256(
            abi.encode(settlement.CLAIM_TYPEHASH(), entry.account, recipient, entry.cumulative, nonce, deadline)
        );
        return keccak256(abi.encodePacked(hex"1901", settlement.domainSeparator(), structHash));
    }

    function sign(RewardSettlement.Claim memory entry, address recipient, uint256 nonce, uint256 deadline)
        private
        view
        returns (bytes memory)
    {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(KEY, digest(entry, recipient, nonce, deadline));
        return abi.encodePacked(r, s, v);
    }

    function expectSkipped(RewardSettlement.Claim memory entry, bytes4 reason) private {
        vm.expectEmit(true, true, true, true, address(settlement));
        emit RewardSettlement.ClaimSkipped(entry.account, entry.epoch, entry.cumulative, reason);
    }

    function expectInvalidProof(RewardSettlement.Claim memory entry) private {
        expectClaimRevert(
            abi.encodeWithSelector(
                RewardSettlement.InvalidProof.selector, entry.account, entry.cumulative, entry.index
            ),
            entry
        );
    }

    function expectClaimRevert(bytes memory reason, RewardSettlement.Claim memory entry) private {
        vm.expectRevert(reason);
        settlement.claim(entry);
    }
}
