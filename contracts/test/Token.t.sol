// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";
import {OpenToken} from "../src/OpenToken.sol";
import {Test} from "./support/Test.sol";

/// The token: a fixed supply, votes by time, approvals by signature.
contract TokenTest is Test {
    uint256 private constant KEY = 0xa11ce;
    uint256 private constant SUPPLY = 1e27;

    OpenToken private token;
    address private alice = vm.addr(KEY);
    address private bob = address(0xb0b);

    function setUp() public {
        vm.warp(1_800_000_000);
        token = new OpenToken(alice, SUPPLY);
    }

    function test_the_supply_is_minted_once_to_its_holder() public view {
        vm.assertEq(token.totalSupply(), SUPPLY);
        vm.assertEq(token.balanceOf(alice), SUPPLY);
        vm.assertEq(uint256(token.decimals()), 18);
    }

    function test_votes_are_counted_by_time_and_only_where_delegated() public {
        vm.assertEq(uint256(token.clock()), block.timestamp);
        vm.assertEq(keccak256(bytes(token.CLOCK_MODE())), keccak256("mode=timestamp"));
        vm.assertEq(token.getVotes(alice), 0);
        vm.startPrank(alice);
        token.delegate(alice);
        uint256 before = block.timestamp;
        vm.warp(before + 10);
        vm.assertTrue(token.transfer(bob, SUPPLY / 4), "transferred");
        vm.stopPrank();
        vm.warp(before + 20);
        vm.assertEq(token.getPastVotes(alice, before + 5), SUPPLY);
        vm.assertEq(token.getPastVotes(alice, before + 15), SUPPLY - SUPPLY / 4);
        vm.assertEq(token.getVotes(bob), 0);
    }

    function test_an_approval_is_given_by_signature_once_and_in_time() public {
        uint256 deadline = block.timestamp + 1;
        bytes32 digest = keccak256(
            abi.encodePacked(
                hex"1901",
                token.DOMAIN_SEPARATOR(),
                keccak256(
                    abi.encode(
                        keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"),
                        alice,
                        bob,
                        77,
                        token.nonces(alice),
                        deadline
                    )
                )
            )
        );
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(KEY, digest);
        token.permit(alice, bob, 77, deadline, v, r, s);
        vm.assertEq(token.allowance(alice, bob), 77);
        vm.expectPartialRevert(ERC20Permit.ERC2612InvalidSigner.selector);
        token.permit(alice, bob, 77, deadline, v, r, s);
        vm.warp(deadline + 1);
        vm.expectRevert(abi.encodeWithSelector(ERC20Permit.ERC2612ExpiredSignature.selector, deadline));
        token.permit(alice, bob, 77, deadline, v, r, s);
    }

    function testFuzz_transfers_conserve_the_supply_and_the_votes(uint256[8] memory amounts) public {
        vm.prank(alice);
        token.delegate(alice);
        vm.prank(bob);
        token.delegate(bob);
        for (uint256 i = 0; i < amounts.length; ++i) {
            (address from, address to) = i % 2 == 0 ? (alice, bob) : (bob, alice);
            uint256 amount = bound(amounts[i], 0, token.balanceOf(from));
            vm.prank(from);
            vm.assertTrue(token.transfer(to, amount), "transferred");
        }
        vm.assertEq(token.balanceOf(alice) + token.balanceOf(bob), SUPPLY);
        vm.assertEq(token.getVotes(alice), token.balanceOf(alice));
        vm.assertEq(token.getVotes(bob), token.balanceOf(bob));
    }
}
