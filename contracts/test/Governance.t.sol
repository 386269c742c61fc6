// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {AccessControl} from "@openzeppelin/contracts/access/AccessControl.sol";
import {IAccessControl} from "@openzeppelin/contracts/access/IAccessControl.sol";
import {IGovernor} from "@openzeppelin/contracts/governance/IGovernor.sol";
import {TimelockController} from "@openzeppelin/contracts/governance/TimelockController.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {OpenGovernor} from "../src/OpenGovernor.sol";
import {OpenToken} from "../src/OpenToken.sol";
import {RewardSettlement} from "../src/RewardSettlement.sol";
import {Deployment} from "./support/Deployment.sol";
import {Test} from "./support/Test.sol";

/// Holders decide, the timelock carries out, and nobody else has a say.
contract GovernanceTest is Test {
    uint256 private constant SUPPLY = 1e27;
    string private constant WHY = "a longer window";

    address private alice = address(0xa11ce);
    address private bob = address(0xb0b);
    address private operator = address(0x09);
    address private arbiter = address(0xa6);

    Deployment private deployed;
    OpenToken private token;
    TimelockController private timelock;
    OpenGovernor private governor;
    RewardSettlement private settlement;

    function setUp() public {
        vm.warp(1_800_000_000);
        deployed = new Deployment(alice, SUPPLY, operator, arbiter);
        (token, timelock, governor, settlement) =
        (deployed.TOKEN(), deployed.TIMELOCK(), deployed.GOVERNOR(), deployed.SETTLEMENT());
        vm.startPrank(alice);
        vm.assertTrue(token.transfer(bob, SUPPLY / 20), "bob votes too");
        token.delegate(alice);
        vm.stopPrank();
        vm.prank(bob);
        token.delegate(bob);
        vm.warp(block.timestamp + 1);
    }

    function test_a_proposal_is_made_voted_on_queued_and_executed() public {
        (address[] memory targets, uint256[] memory values, bytes[] memory calls) = newTerms();
        vm.prank(alice);
        uint256 id = governor.propose(targets, values, calls, WHY);
        assertState(id, IGovernor.ProposalState.Pending);
        vm.warp(block.timestamp + deployed.VOTING_DELAY() + 1);
        vm.prank(alice);
        governor.castVote(id, 1);
        vm.prank(bob);
        governor.castVote(id, 0);
        vm.warp(block.timestamp + deployed.VOTING_PERIOD());
        assertState(id, IGovernor.ProposalState.Succeeded);

        governor.queue(targets, values, calls, keccak256(bytes(WHY)));
        assertState(id, IGovernor.ProposalState.Queued);
        vm.expectPartialRevert(TimelockController.TimelockUnexpectedOperationState.selector);
        governor.execute(targets, values, calls, keccak256(bytes(WHY)));
        vm.assertEq(settlement.terms().challengeWindow, 1 days);

        vm.warp(block.timestamp + deployed.DELAY());
        governor.execute(targets, values, calls, keccak256(bytes(WHY)));
        assertState(id, IGovernor.ProposalState.Executed);
        vm.assertEq(settlement.terms().challengeWindow, 3 days);
    }

    function test_a_proposal_without_quorum_or_majority_is_defeated() public {
        (address[] memory targets, uint256[] memory values, bytes[] memory calls) = newTerms();
        vm.prank(alice);
        uint256 id = governor.propose(targets, values, calls, WHY);
        vm.warp(block.timestamp + deployed.VOTING_DELAY() + 1);
        vm.prank(bob);
        governor.castVote(id, 1);
        vm.prank(alice);
        governor.castVote(id, 0);
        vm.warp(block.timestamp + deployed.VOTING_PERIOD());
        assertState(id, IGovernor.ProposalState.Defeated);
        vm.expectPartialRevert(IGovernor.GovernorUnexpectedProposalState.selector);
        governor.queue(targets, values, calls, keccak256(bytes(WHY)));

        vm.prank(alice);
        id = governor.propose(targets, values, calls, "again");
        vm.warp(block.timestamp + deployed.VOTING_DELAY() + deployed.VOTING_PERIOD() + 1);
        assertState(id, IGovernor.ProposalState.Defeated);
    }

    function test_a_proposer_needs_the_threshold() public {
        (address[] memory targets, uint256[] memory values, bytes[] memory calls) = newTerms();
        vm.assertEq(governor.proposalThreshold(), SUPPLY / 1000);
        vm.expectPartialRevert(IGovernor.GovernorInsufficientProposerVotes.selector);
        vm.prank(operator);
        governor.propose(targets, values, calls, WHY);
    }

    function test_every_role_is_administered_by_the_timelock_and_nobody_else() public view {
        AccessControl[3] memory governed =
            [AccessControl(settlement), AccessControl(deployed.DATANETS()), AccessControl(deployed.MODELS())];
        address[6] memory others = [address(deployed), address(this), alice, operator, arbiter, address(governor)];
        bytes32 admin = bytes32(0);
        for (uint256 i = 0; i < governed.length; ++i) {
            vm.assertTrue(governed[i].hasRole(admin, address(timelock)), "the timelock administers");
            for (uint256 k = 0; k < others.length; ++k) {
                vm.assertFalse(governed[i].hasRole(admin, others[k]), "nobody else does");
            }
        }
        bytes32[3] memory roles =
            [settlement.PROPOSER_ROLE(), settlement.ARBITER_ROLE(), deployed.MODELS().REGISTRAR_ROLE()];
        for (uint256 i = 0; i < roles.length; ++i) {
            for (uint256 k = 0; k < governed.length; ++k) {
                vm.assertEq(governed[k].getRoleAdmin(roles[i]), admin);
            }
        }
        vm.assertEq(settlement.TREASURY(), address(timelock));
        // The timelock: its own admin, told what to do by the governor, by nobody else.
        vm.assertTrue(timelock.hasRole(admin, address(timelock)), "its own admin");
        vm.assertTrue(timelock.hasRole(timelock.PROPOSER_ROLE(), address(governor)), "the governor proposes");
        vm.assertTrue(timelock.hasRole(timelock.EXECUTOR_ROLE(), address(0)), "anyone executes what is due");
        for (uint256 k = 0; k < 5; ++k) {
            vm.assertFalse(timelock.hasRole(admin, others[k]), "no other admin");
            vm.assertFalse(timelock.hasRole(timelock.PROPOSER_ROLE(), others[k]), "no other proposer");
            vm.assertFalse(timelock.hasRole(timelock.CANCELLER_ROLE(), others[k]), "no other canceller");
        }
    }

    function test_the_deployer_and_the_operator_change_nothing() public {
        address[2] memory who = [address(deployed), operator];
        bytes32 role = settlement.PROPOSER_ROLE();
        for (uint256 i = 0; i < who.length; ++i) {
            vm.startPrank(who[i]);
            vm.expectPartialRevert(IAccessControl.AccessControlUnauthorizedAccount.selector);
            settlement.grantRole(role, who[i]);
            vm.expectPartialRevert(IAccessControl.AccessControlUnauthorizedAccount.selector);
            settlement.setTerms(RewardSettlement.Terms(0, 1, 1));
            vm.expectPartialRevert(IAccessControl.AccessControlUnauthorizedAccount.selector);
            settlement.recoverExcess(IERC20(address(token)), who[i], 0);
            vm.expectPartialRevert(IAccessControl.AccessControlUnauthorizedAccount.selector);
            timelock.schedule(address(settlement), 0, "", 0, 0, 2 days);
            vm.stopPrank();
        }
    }

    /// A proxy would have an implementation slot or a delegatecall; the code has no delegatecall (0xf4), callcode (0xf2) or
    /// selfdestruct (0xff) outside of the constants that PUSH instructions carry.
    function test_nothing_is_upgradeable() public view {
        address[5] memory all = [
            address(token),
            address(governor),
            address(settlement),
            address(deployed.DATANETS()),
            address(deployed.MODELS())
        ];
        for (uint256 i = 0; i < all.length; ++i) {
            bytes memory code = all[i].code;
            uint256 end = code.length;
            for (uint256 pc = 0; pc < end; ++pc) {
                uint8 op = uint8(code[pc]);
                if (op == 0xfe) break; // what follows the first INVALID is data
                vm.assertTrue(op != 0xf4 && op != 0xf2 && op != 0xff, "the code can be replaced");
                if (op >= 0x60 && op <= 0x7f) pc += op - 0x5f;
            }
        }
    }

    function newTerms() private view returns (address[] memory, uint256[] memory, bytes[] memory) {
        address[] memory targets = new address[](1);
        bytes[] memory calls = new bytes[](1);
        targets[0] = address(settlement);
        calls[0] = abi.encodeCall(settlement.setTerms, (RewardSettlement.Terms(1 ether, 3 days, 14 days)));
        return (targets, new uint256[](1), calls);
    }

    function assertState(uint256 id, IGovernor.ProposalState expected) private view {
        vm.assertEq(uint256(governor.state(id)), uint256(expected));
    }
}
