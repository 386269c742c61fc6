// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {RewardSettlement} from "../../src/RewardSettlement.sol";
import {Test} from "./Test.sol";
import {OddToken} from "./Tokens.sol";
import {Tree} from "./Tree.sol";

/// Does to a settlement whatever its parties can do, in any order, and keeps books of its own.
/// Every step goes through; where something must be refused, the step checks that it is.
contract SettlementHandler is Test {
    uint256 public constant ACCOUNTS = 6;

    RewardSettlement public immutable SETTLEMENT;
    OddToken public immutable TOKEN;
    address public immutable ADMIN;
    address public immutable PROPOSER;
    address public immutable ARBITER;

    // The books.
    uint256 public deposited;
    uint256 public recovered;
    uint256 public bondsIn;
    uint256 public bondsOut;
    uint256 public finalizations;
    uint256 public paidTotal;
    uint256[6] public paid;
    /// The most that a finalized leaf ever promised each account.
    uint256[6] public promised;
    /// Something happened that must not; the reason, for the message of the failing invariant.
    string public violation;
    /// How often each step did something.
    mapping(bytes4 step => uint256) public done;

    /// Honest leaves of the last final epoch, of the open one, and what the open root really says.
    uint256[6] private base;
    uint256[6] private honest;
    uint256[6] private open;
    mapping(uint64 epoch => uint256[6]) private leaves;

    constructor(RewardSettlement settlement, OddToken token, address admin, address proposer, address arbiter) {
        (SETTLEMENT, TOKEN, ADMIN, PROPOSER, ARBITER) = (settlement, token, admin, proposer, arbiter);
    }

    function fund(uint256 amount) external {
        amount = bound(amount, 0, 1e24);
        TOKEN.mint(address(SETTLEMENT), amount);
        deposited += amount;
        done[msg.sig]++;
    }

    /// An honest root, or one whose leaves promise more than its total, or less than before.
    function propose(uint256[6] memory growth, uint256 kind) external {
        if (status() != RewardSettlement.Status.None) return refuseSecondProposal();
        uint64 epoch = SETTLEMENT.totals().epoch + 1;
        uint256 available = SETTLEMENT.excess();
        uint256 total = SETTLEMENT.totals().finalized;
        uint256 sum = 0;
        for (uint256 i = 0; i < ACCOUNTS; ++i) {
            uint256 more = bound(growth[i], 0, available / ACCOUNTS);
            honest[i] = base[i] + more;
            sum += more;
        }
        total += sum;
        open = honest;
        if (kind % 8 == 0) open[0] += 1e24;
        if (kind % 8 == 1) open[1] = open[1] / 2;
        bytes32 root = Tree.root(hashes(open));

        uint256 bond = SETTLEMENT.terms().bond;
        vm.deal(PROPOSER, bond);
        vm.prank(PROPOSER);
        SETTLEMENT.propose{value: bond}(epoch, root, bytes32(kind), total, keccak256("manifest"));
        bondsIn += bond;
        done[msg.sig]++;
    }

    function challenge(address challenger) external {
        RewardSettlement.Proposal memory p = SETTLEMENT.proposal();
        if (p.status != RewardSettlement.Status.Pending || block.timestamp >= p.finalizableAt) return;
        challenger = actor(uint160(challenger));
        vm.deal(challenger, p.bond);
        vm.prank(challenger);
        SETTLEMENT.challenge{value: p.bond}(p.epoch, p.payoutRoot, 0);
        bondsIn += p.bond;
        done[msg.sig]++;
    }

    function resolve(bool upheld) external {
        RewardSettlement.Proposal memory p = SETTLEMENT.proposal();
        if (p.status != RewardSettlement.Status.Disputed || block.timestamp >= p.resolvableUntil) return;
        vm.prank(ARBITER);
        SETTLEMENT.resolve(p.epoch, p.payoutRoot, upheld);
        done[msg.sig]++;
    }

    function expire() external {
        RewardSettlement.Proposal memory p = SETTLEMENT.proposal();
        if (p.status != RewardSettlement.Status.Disputed || block.timestamp < p.resolvableUntil) return;
        SETTLEMENT.expire(p.epoch, p.payoutRoot);
        done[msg.sig]++;
    }

    function cancel(uint256 chance) external {
        RewardSettlement.Proposal memory p = SETTLEMENT.proposal();
        if (chance % 8 != 0 || p.status != RewardSettlement.Status.Pending) return;
        vm.prank(ADMIN);
        SETTLEMENT.cancel(p.epoch, p.payoutRoot);
        done[msg.sig]++;
    }

    function finalize() external {
        RewardSettlement.Proposal memory p = SETTLEMENT.proposal();
        if (p.status != RewardSettlement.Status.Pending || block.timestamp < p.finalizableAt) {
            (bool early,) = address(SETTLEMENT).call(abi.encodeCall(SETTLEMENT.finalize, (p.epoch, p.payoutRoot)));
            if (early) violation = "finalized before its time or under dispute";
            return;
        }
        SETTLEMENT.finalize(p.epoch, p.payoutRoot);
        finalizations++;
        leaves[p.epoch] = open;
        base = honest;
        for (uint256 i = 0; i < ACCOUNTS; ++i) {
            if (open[i] > promised[i]) promised[i] = open[i];
        }
        done[msg.sig]++;
    }

    /// A claim from the last root or the one before.
    function claim(uint256 index, bool last) external {
        uint64 epoch = SETTLEMENT.totals().epoch;
        if (!last && epoch > 1) epoch -= 1;
        if (epoch == 0) return;
        RewardSettlement.Claim memory entry = entryOf(epoch, leaves[epoch], index % ACCOUNTS);
        uint256 before = TOKEN.balanceOf(entry.account);
        try SETTLEMENT.claim(entry) returns (uint256 amount) {
            note(index % ACCOUNTS, amount, TOKEN.balanceOf(entry.account) - before);
            done[msg.sig]++;
        } catch {}
        (bool again,) = address(SETTLEMENT).call(abi.encodeCall(SETTLEMENT.claim, (entry)));
        if (again) violation = "paid twice";
    }

    function claimBatch() external {
        uint64 epoch = SETTLEMENT.totals().epoch;
        if (epoch == 0) return;
        RewardSettlement.Claim[] memory entries = new RewardSettlement.Claim[](ACCOUNTS);
        uint256[6] memory before;
        for (uint256 i = 0; i < ACCOUNTS; ++i) {
            entries[i] = entryOf(epoch, leaves[epoch], i);
            before[i] = TOKEN.balanceOf(entries[i].account);
        }
        uint256 total = SETTLEMENT.claimBatch(entries);
        uint256 arrived = 0;
        for (uint256 i = 0; i < ACCOUNTS; ++i) {
            uint256 got = TOKEN.balanceOf(entries[i].account) - before[i];
            arrived += got;
            note(i, got, got);
        }
        if (arrived != total) violation = "a batch paid another sum than it says";
        done[msg.sig]++;
    }

    /// From an open proposal nothing is paid, under no epoch number.
    function claimEarly(uint256 index) external {
        RewardSettlement.Proposal memory p = SETTLEMENT.proposal();
        if (p.status == RewardSettlement.Status.None) return;
        RewardSettlement.Claim memory entry = entryOf(p.epoch, open, index % ACCOUNTS);
        (bool early,) = address(SETTLEMENT).call(abi.encodeCall(SETTLEMENT.claim, (entry)));
        entry.epoch = p.epoch - 1;
        bool same = p.epoch > 1 && SETTLEMENT.finalizedRoot(p.epoch - 1) == p.payoutRoot;
        if (!same) {
            (bool earlier,) = address(SETTLEMENT).call(abi.encodeCall(SETTLEMENT.claim, (entry)));
            early = early || earlier;
        }
        if (early) violation = "paid from a root that is not final";
        done[msg.sig]++;
    }

    function recoverExcess(uint256 amount) external {
        uint256 free = SETTLEMENT.excess();
        vm.prank(ADMIN);
        (bool more,) = address(SETTLEMENT)
            .call(abi.encodeCall(SETTLEMENT.recoverExcess, (IERC20(address(TOKEN)), ADMIN, free + 1)));
        if (more) violation = "recovered what is owed";
        amount = bound(amount, 0, free / 2);
        vm.prank(ADMIN);
        SETTLEMENT.recoverExcess(IERC20(address(TOKEN)), ADMIN, amount);
        recovered += amount;
        done[msg.sig]++;
    }

    function setTerms(uint96 bond) external {
        vm.prank(ADMIN);
        SETTLEMENT.setTerms(RewardSettlement.Terms(bond, 1 hours, 2 hours));
        done[msg.sig]++;
    }

    function withdrawBond(uint256 which) external {
        address who = parties(which % 6);
        uint256 credit = SETTLEMENT.bondCredit(who);
        if (credit == 0) return;
        vm.prank(who);
        bondsOut += SETTLEMENT.withdrawBond(payable(address(0xdead)));
        done[msg.sig]++;
    }

    function wait(uint256 duration) external {
        vm.warp(block.timestamp + bound(duration, 1 minutes, 90 minutes));
        done[msg.sig]++;
    }

    /// Proposer, admin and challengers: everybody who can have a credit.
    function parties(uint256 i) public view returns (address) {
        if (i == 0) return PROPOSER;
        if (i == 1) return ADMIN;
        return actor(i - 2);
    }

    function accountAt(uint256 i) public pure returns (address) {
        return address(uint160(0x1001 + i));
    }

    function status() private view returns (RewardSettlement.Status) {
        return SETTLEMENT.proposal().status;
    }

    function actor(uint256 seed) private pure returns (address) {
        return address(uint160(0xac70 + seed % 4));
    }

    function refuseSecondProposal() private {
        uint64 next = SETTLEMENT.totals().epoch + 1;
        uint256 bond = SETTLEMENT.terms().bond;
        vm.deal(PROPOSER, bond);
        vm.prank(PROPOSER);
        (bool second,) = address(SETTLEMENT).call{value: bond}(
            abi.encodeCall(SETTLEMENT.propose, (next, keccak256("other"), 0, type(uint112).max, 0))
        );
        if (second) violation = "two proposals at once";
    }

    function note(uint256 i, uint256 amount, uint256 arrived) private {
        if (amount != arrived) violation = "paid another amount than it says";
        paid[i] += arrived;
        paidTotal += arrived;
        if (SETTLEMENT.claimed(accountAt(i)) != paid[i]) violation = "claimed is not what was paid";
    }

    function hashes(uint256[6] memory amounts) private view returns (bytes32[] memory list) {
        list = new bytes32[](ACCOUNTS);
        for (uint256 i = 0; i < ACCOUNTS; ++i) {
            list[i] = SETTLEMENT.leafHash(accountAt(i), amounts[i]);
        }
    }

    function entryOf(uint64 epoch, uint256[6] memory amounts, uint256 i)
        private
        view
        returns (RewardSettlement.Claim memory)
    {
        return RewardSettlement.Claim(epoch, accountAt(i), amounts[i], i, Tree.proof(hashes(amounts), i));
    }
}
