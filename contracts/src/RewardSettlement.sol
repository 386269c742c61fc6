// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {AccessControl} from "@openzeppelin/contracts/access/AccessControl.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {Nonces} from "@openzeppelin/contracts/utils/Nonces.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {SignatureChecker} from "@openzeppelin/contracts/utils/cryptography/SignatureChecker.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";
import {BondVault} from "./BondVault.sol";
import {IndexedMerkle} from "./libraries/IndexedMerkle.sol";

/// @title RewardSettlement: one root per epoch, from which every account claims what it has earned so far
/// @notice Life of an epoch: a proposer posts the root and a bond; during the window anyone may challenge it with an
/// equal bond, and an arbiter rules; unchallenged or upheld it is finalized by anyone and can be claimed from.
///
/// Amounts in a root are cumulative per account, so a claim pays the difference to what was claimed before: no claim can
/// be paid twice, and one that was skipped is in the next root. An epoch's total must be covered by this contract's
/// balance before it can be proposed; fund it with plain transfers of the token.
///
/// There is one token per deployment. A token that misbehaves can then stop no other, solvency is one inequality, and
/// `propose` costs the same whatever the epoch holds. Nothing here is upgradeable, and nobody can pause claims.
/// @dev Amounts are units of `TOKEN`, bonds are wei, times are seconds. `claimed <= finalized <= 2^112 - 1`. A caller without
/// the role that a function names meets `AccessControlUnauthorizedAccount`; a proposal that is not open, not in the state
/// or not under the root that a function needs, `NoSuchProposal`.
contract RewardSettlement is AccessControl, EIP712, Nonces, BondVault {
    using SafeCast for uint256;
    using SafeERC20 for IERC20;

    /// @param payoutRoot Root of the payout tree (docs/contracts.md).
    /// @param receiptsRoot Root over the receipts that the epoch pays for; published, not interpreted.
    /// @param manifestHash Hash of the epoch's public manifest; published, not interpreted.
    /// @param totalCumulative Sum of all leaves.
    /// @param epoch Last finalized epoch + 1.
    /// @param finalizableAt End of the challenge window.
    /// @param resolvableUntil Disputed: when the arbiter's time is up. Otherwise of no meaning.
    /// @param bond Posted by the proposer, and the challenger's due.
    struct Proposal {
        bytes32 payoutRoot;
        bytes32 receiptsRoot;
        bytes32 manifestHash;
        uint112 totalCumulative;
        uint32 epoch;
        uint48 finalizableAt;
        uint48 resolvableUntil;
        Status status;
        address proposer;
        uint96 bond;
        address challenger;
    }

    enum Status {
        None, // no proposal is open; the other fields are leftovers
        Pending,
        Disputed
    }

    enum Rejection {
        ChallengeUpheld,
        ArbiterTimeout,
        Cancelled
    }

    /// @param finalized Sum of everything that the last finalized root promises.
    /// @param claimed Sum of everything paid out.
    /// @param epoch Last finalized epoch; 0 before the first.
    struct Totals {
        uint112 finalized;
        uint112 claimed;
        uint32 epoch;
    }

    /// @param bond Wei that a proposal costs, and a challenge to it.
    /// @param challengeWindow Seconds from a proposal to the moment from which it can be finalized.
    /// @param arbitrationWindow Seconds that the arbiter has from a challenge on.
    struct Terms {
        uint96 bond;
        uint32 challengeWindow;
        uint32 arbitrationWindow;
    }

    /// @param epoch The last finalized epoch or the one before it.
    /// @param account Whose leaf it is.
    /// @param cumulative What the leaf says.
    /// @param index The leaf's place in the tree.
    /// @param proof Siblings from the bottom up; its length is the tree's depth.
    struct Claim {
        uint64 epoch;
        address account;
        uint256 cumulative;
        uint256 index;
        bytes32[] proof;
    }

    /// @notice May propose epochs.
    bytes32 public constant PROPOSER_ROLE = keccak256("PROPOSER_ROLE");
    /// @notice Rules on challenged proposals.
    bytes32 public constant ARBITER_ROLE = keccak256("ARBITER_ROLE");
    /// @notice First word of every leaf's preimage.
    bytes32 public constant LEAF_DOMAIN = keccak256("OpenLoRA.RewardSettlement.Leaf.v1");
    /// @notice EIP-712 type of `claimFor`'s authorization.
    bytes32 public constant CLAIM_TYPEHASH =
        keccak256("Claim(address account,address recipient,uint256 cumulative,uint256 nonce,uint256 deadline)");
    /// @notice Entries that one `claimBatch` takes.
    uint256 public constant BATCH_MAX = 200;
    /// @notice The longest that either window can be set to.
    uint256 public constant WINDOW_MAX = 30 days;

    /// @notice What is paid out.
    IERC20 public immutable TOKEN;

    /// @notice What each account has been paid so far.
    mapping(address account => uint256) public claimed;
    /// @notice The payout root of each finalized epoch.
    mapping(uint64 epoch => bytes32) public finalizedRoot;

    Totals private _totals;
    Terms private _terms;
    Proposal private _proposal;

    event Proposed(
        uint64 indexed epoch,
        bytes32 indexed payoutRoot,
        address indexed proposer,
        bytes32 receiptsRoot,
        uint256 totalCumulative,
        bytes32 manifestHash,
        uint256 bond,
        uint64 finalizableAt
    );
    event Challenged(
        uint64 indexed epoch,
        bytes32 indexed payoutRoot,
        address indexed challenger,
        bytes32 evidenceHash,
        uint64 resolvableUntil
    );
    /// @notice The arbiter found the root right; it can be finalized from `finalizableAt` on.
    event ChallengeDismissed(uint64 indexed epoch, bytes32 indexed payoutRoot, uint64 finalizableAt);
    /// @notice The proposal is gone; its epoch number is free again.
    event Rejected(uint64 indexed epoch, bytes32 indexed payoutRoot, Rejection reason);
    event Finalized(uint64 indexed epoch, bytes32 indexed payoutRoot, uint256 totalCumulative);
    event Claimed(address indexed account, uint64 indexed epoch, address recipient, uint256 amount, uint256 cumulative);
    /// @param reason Selector of the error that the entry alone would have reverted with; 0 where there was none.
    event ClaimSkipped(address indexed account, uint64 indexed epoch, uint256 cumulative, bytes4 reason);
    event TermsSet(uint256 bond, uint256 challengeWindow, uint256 arbitrationWindow);
    event Recovered(address indexed token, address indexed to, uint256 amount);

    error WrongEpoch(uint64 given, uint64 required);
    error ProposalOpen(uint64 epoch, bytes32 payoutRoot);
    error NoSuchProposal(uint64 epoch, bytes32 payoutRoot, Status status);
    error EmptyRoot();
    error TotalDecreased(uint256 given, uint256 finalized);
    error TotalTooLarge(uint256 given, uint256 max);
    error Insolvent(uint256 balance, uint256 required);
    error ChallengeWindowOver(uint256 timestamp, uint256 finalizableAt);
    error ChallengeWindowOpen(uint256 timestamp, uint256 finalizableAt);
    error ArbitrationOver(uint256 timestamp, uint256 resolvableUntil);
    error ArbitrationOpen(uint256 timestamp, uint256 resolvableUntil);
    error EpochNotClaimable(uint64 given, uint64 last);
    error InvalidProof(address account, uint256 cumulative, uint256 index);
    error NothingToClaim(uint256 cumulative, uint256 claimed);
    error ExceedsFinalized(uint256 amount, uint256 unclaimed);
    error NotTheAccount(address caller, address account);
    error SignatureExpired(uint256 timestamp, uint256 deadline);
    error SignatureInvalid(address account);
    error BatchTooLarge(uint256 given, uint256 max);
    error ExceedsExcess(uint256 amount, uint256 excess);
    error WindowOutOfRange(uint256 given, uint256 min, uint256 max);

    /// @param token What is paid out; must not be able to take balance away (no rebasing). One that takes a fee from what
    /// arrives is accounted at what was sent.
    /// @param admin Administers every role and setting: the timelock. Also receives half of forfeited bonds.
    /// @param proposer First holder of PROPOSER_ROLE; the zero address for none.
    /// @param arbiter First holder of ARBITER_ROLE; the zero address for none.
    /// @param terms_ Bond and windows; reverts with `WindowOutOfRange` as `setTerms` does.
    constructor(IERC20 token, address admin, address proposer, address arbiter, Terms memory terms_)
        EIP712("OpenLoRA RewardSettlement", "1")
        BondVault(admin)
    {
        if (address(token) == address(0)) revert ZeroAddress();
        TOKEN = token;
        _grantRole(DEFAULT_ADMIN_ROLE, admin);
        if (proposer != address(0)) _grantRole(PROPOSER_ROLE, proposer);
        if (arbiter != address(0)) _grantRole(ARBITER_ROLE, arbiter);
        _setTerms(terms_);
    }

    // An epoch's life

    /// @notice Opens epoch `epoch` with its root. Only proposers, with exactly the bond (`WrongBond`). The epoch number makes
    /// a retry harmless: while it is open `ProposalOpen` says with which root, once finalized `WrongEpoch` says so.
    /// @param epoch Last finalized epoch + 1, else `WrongEpoch`. A rejected number is used again.
    /// @param payoutRoot Root of the payout tree; `EmptyRoot` at zero.
    /// @param receiptsRoot Published with the root; any value.
    /// @param totalCumulative Sum of all leaves: not below the last finalized total (`TotalDecreased`), at most 2^112 - 1
    /// (`TotalTooLarge`), and covered by the balance and what was claimed before (`Insolvent`).
    /// @param manifestHash Published with the root; any value.
    function propose(
        uint64 epoch,
        bytes32 payoutRoot,
        bytes32 receiptsRoot,
        uint256 totalCumulative,
        bytes32 manifestHash
    ) external payable onlyRole(PROPOSER_ROLE) nonReentrant {
        Proposal storage open = _proposal;
        if (open.status != Status.None) revert ProposalOpen(open.epoch, open.payoutRoot);
        Totals memory totals_ = _totals;
        uint64 required = uint64(totals_.epoch) + 1;
        if (epoch != required) revert WrongEpoch(epoch, required);
        Terms memory terms_ = _terms;
        if (msg.value != terms_.bond) revert WrongBond(msg.value, terms_.bond);
        if (payoutRoot == 0) revert EmptyRoot();
        if (totalCumulative < totals_.finalized) revert TotalDecreased(totalCumulative, totals_.finalized);
        if (totalCumulative > type(uint112).max) revert TotalTooLarge(totalCumulative, type(uint112).max);
        _requireSolvent(totalCumulative - totals_.claimed);

        uint48 finalizableAt = uint48(block.timestamp) + terms_.challengeWindow;
        open.payoutRoot = payoutRoot;
        open.receiptsRoot = receiptsRoot;
        open.manifestHash = manifestHash;
        open.totalCumulative = totalCumulative.toUint112();
        open.epoch = uint256(epoch).toUint32();
        open.finalizableAt = finalizableAt;
        open.resolvableUntil = 0;
        open.status = Status.Pending;
        open.proposer = msg.sender;
        open.bond = terms_.bond;
        emit Proposed(
            epoch, payoutRoot, msg.sender, receiptsRoot, totalCumulative, manifestHash, terms_.bond, finalizableAt
        );
    }

    /// @notice Stops a pending proposal until the arbiter has ruled. Open to anyone who sends the proposal's bond
    /// (`WrongBond`), to the end of the window (`ChallengeWindowOver`).
    /// @param epoch,payoutRoot Must be those of the pending proposal (`NoSuchProposal`): after a reorganisation of the chain
    /// a challenge must not hit another root.
    /// @param evidenceHash Hash of what shows the root to be wrong; published, not interpreted.
    function challenge(uint64 epoch, bytes32 payoutRoot, bytes32 evidenceHash) external payable {
        Proposal storage open = _openProposal(epoch, payoutRoot, Status.Pending);
        if (block.timestamp >= open.finalizableAt) revert ChallengeWindowOver(block.timestamp, open.finalizableAt);
        if (msg.value != open.bond) revert WrongBond(msg.value, open.bond);
        uint48 resolvableUntil = uint48(block.timestamp) + _terms.arbitrationWindow;
        open.status = Status.Disputed;
        open.challenger = msg.sender;
        open.resolvableUntil = resolvableUntil;
        emit Challenged(epoch, payoutRoot, msg.sender, evidenceHash, resolvableUntil);
    }

    /// @notice The arbiter's ruling on a disputed root, on the root itself, not only on the evidence named with the
    /// challenge. Half of the loser's bond is credited to the winner, the other half to the treasury; the winner's own
    /// comes back with the ruling (challenger) or with the finalized root (proposer). A root found right can be finalized
    /// once its window is over, which may be at once. `ArbitrationOver` when the arbiter's time is up.
    /// @param upheld True where the root is wrong: the proposal is rejected.
    function resolve(uint64 epoch, bytes32 payoutRoot, bool upheld) external onlyRole(ARBITER_ROLE) {
        Proposal storage open = _openProposal(epoch, payoutRoot, Status.Disputed);
        if (block.timestamp >= open.resolvableUntil) revert ArbitrationOver(block.timestamp, open.resolvableUntil);
        uint256 bond = open.bond;
        address challenger = open.challenger;
        if (upheld) {
            open.status = Status.None;
            emit Rejected(epoch, payoutRoot, Rejection.ChallengeUpheld);
            _creditBond(challenger, bond);
            _forfeitBond(challenger, bond);
        } else {
            // The proposer's own bond stays with the proposal, which may be challenged again while its window is open.
            open.status = Status.Pending;
            emit ChallengeDismissed(epoch, payoutRoot, open.finalizableAt);
            _forfeitBond(open.proposer, bond);
        }
    }

    /// @notice Rejects a disputed proposal on which the arbiter did not rule in time (`ArbitrationOpen` before); both bonds
    /// are credited back. Open to anyone, so that an absent arbiter cannot stop settlement for good.
    function expire(uint64 epoch, bytes32 payoutRoot) external {
        Proposal storage open = _openProposal(epoch, payoutRoot, Status.Disputed);
        if (block.timestamp < open.resolvableUntil) revert ArbitrationOpen(block.timestamp, open.resolvableUntil);
        open.status = Status.None;
        emit Rejected(epoch, payoutRoot, Rejection.ArbiterTimeout);
        _creditBond(open.proposer, open.bond);
        _creditBond(open.challenger, open.bond);
    }

    /// @notice Rejects a pending proposal and credits its bond back: the way out where one cannot be finalized because the
    /// token took balance away. Only for the admin: a proposer who could withdraw would do it just before a challenge.
    function cancel(uint64 epoch, bytes32 payoutRoot) external onlyRole(DEFAULT_ADMIN_ROLE) {
        Proposal storage open = _openProposal(epoch, payoutRoot, Status.Pending);
        open.status = Status.None;
        emit Rejected(epoch, payoutRoot, Rejection.Cancelled);
        _creditBond(open.proposer, open.bond);
    }

    /// @notice Makes a pending root claimable after its window (`ChallengeWindowOpen` before); the bond is credited back.
    /// Open to anyone. Reverts with `Insolvent` where the balance no longer covers it: fund and call again.
    function finalize(uint64 epoch, bytes32 payoutRoot) external nonReentrant {
        Proposal storage open = _openProposal(epoch, payoutRoot, Status.Pending);
        if (block.timestamp < open.finalizableAt) revert ChallengeWindowOpen(block.timestamp, open.finalizableAt);
        uint112 total = open.totalCumulative;
        _requireSolvent(total - _totals.claimed);
        open.status = Status.None;
        _totals.finalized = total;
        _totals.epoch = open.epoch;
        finalizedRoot[epoch] = payoutRoot;
        emit Finalized(epoch, payoutRoot, total);
        _creditBond(open.proposer, open.bond);
    }

    // Claims

    /// @notice Pays an account what it has earned and not been paid yet, to the account itself; anyone may call.
    /// @dev Reverts with `EpochNotClaimable` unless the epoch is the last finalized one or the one before it (so that a
    /// claim on its way survives a new epoch), `InvalidProof`, `NothingToClaim`, `ExceedsFinalized` (the leaves of the
    /// root sum to more than its total), or as the token does.
    /// @return amount Units paid.
    function claim(Claim calldata entry) external nonReentrant returns (uint256 amount) {
        return _claim(entry, entry.account);
    }

    /// @notice Like `claim`, but to `recipient`; only the account itself may call (`NotTheAccount`).
    function claimTo(Claim calldata entry, address recipient) external nonReentrant returns (uint256 amount) {
        if (msg.sender != entry.account) revert NotTheAccount(msg.sender, entry.account);
        return _claim(entry, recipient);
    }

    /// @notice Like `claimTo`, but carried by anyone who has the account's EIP-712 signature over (account, recipient,
    /// cumulative, nonce, deadline). Contract accounts sign by EIP-1271.
    /// @param deadline Last second at which the signature counts (`SignatureExpired`).
    /// @param signature By `entry.account` with its nonce `nonces(account)`, else `SignatureInvalid`.
    function claimFor(Claim calldata entry, address recipient, uint256 deadline, bytes calldata signature)
        external
        nonReentrant
        returns (uint256 amount)
    {
        if (block.timestamp > deadline) revert SignatureExpired(block.timestamp, deadline);
        address account = entry.account;
        bytes32 digest = _hashTypedDataV4(
            keccak256(abi.encode(CLAIM_TYPEHASH, account, recipient, entry.cumulative, _useNonce(account), deadline))
        );
        if (!SignatureChecker.isValidSignatureNowCalldata(account, digest, signature)) {
            revert SignatureInvalid(account);
        }
        return _claim(entry, recipient);
    }

    /// @notice Makes every signature over the caller's current nonce worthless.
    function revokeSignature() external {
        _useNonce(msg.sender);
    }

    /// @notice `claim` for many accounts. An entry that cannot be paid is skipped with `ClaimSkipped` and does not touch the
    /// others. Reverts with `BatchTooLarge` above `BATCH_MAX` entries.
    /// @return paid Units paid, over all entries.
    function claimBatch(Claim[] calldata entries) external nonReentrant returns (uint256 paid) {
        if (entries.length > BATCH_MAX) revert BatchTooLarge(entries.length, BATCH_MAX);
        for (uint256 i = 0; i < entries.length; ++i) {
            // A call of its own, so that all of an entry's effects happen or none, whatever the token does.
            try this.claimInBatch(entries[i]) returns (uint256 amount) {
                paid += amount;
            } catch (bytes memory reason) {
                // casting to 'bytes4' is meant to cut: the selector is all that is kept
                // forge-lint: disable-next-line(unsafe-typecast)
                emit ClaimSkipped(entries[i].account, entries[i].epoch, entries[i].cumulative, bytes4(reason));
            }
        }
    }

    /// @notice One entry of `claimBatch`; reverts with `NotTheAccount` for any caller but this contract.
    function claimInBatch(Claim calldata entry) external returns (uint256 amount) {
        if (msg.sender != address(this)) revert NotTheAccount(msg.sender, address(this));
        return _claim(entry, entry.account);
    }

    // Administration, all behind the timelock

    /// @notice Sets bond and windows for proposals to come; an open one keeps its bond and its window.
    /// Reverts with `WindowOutOfRange` unless both windows are 1 second to `WINDOW_MAX`.
    function setTerms(Terms calldata terms_) external onlyRole(DEFAULT_ADMIN_ROLE) {
        _setTerms(terms_);
    }

    /// @notice Sends out tokens that nobody is owed: all of any other token, and of `TOKEN` what exceeds `liabilities()`
    /// (`ExceedsExcess`).
    function recoverExcess(IERC20 token, address to, uint256 amount)
        external
        onlyRole(DEFAULT_ADMIN_ROLE)
        nonReentrant
    {
        if (address(token) == address(TOKEN)) {
            uint256 free = excess();
            if (amount > free) revert ExceedsExcess(amount, free);
        }
        emit Recovered(address(token), to, amount);
        token.safeTransfer(to, amount);
    }

    // Views

    /// @notice Finalized and claimed sums and the last finalized epoch.
    function totals() external view returns (Totals memory) {
        return _totals;
    }

    /// @notice The bond and windows that the next proposal gets.
    function terms() external view returns (Terms memory) {
        return _terms;
    }

    /// @notice The open proposal; with status `None` there is none.
    function proposal() external view returns (Proposal memory open) {
        if (_proposal.status != Status.None) open = _proposal;
    }

    /// @notice Units that have to stay here: promised by the last finalized root or the open proposal, not yet claimed.
    function liabilities() public view returns (uint256) {
        Totals memory totals_ = _totals;
        uint256 promised = totals_.finalized;
        if (_proposal.status != Status.None) promised = _proposal.totalCumulative;
        return promised - totals_.claimed;
    }

    /// @notice Units held beyond `liabilities()`: what `recoverExcess` can send, and what a next epoch can promise more.
    function excess() public view returns (uint256) {
        uint256 balance = TOKEN.balanceOf(address(this));
        uint256 owed = liabilities();
        return balance > owed ? balance - owed : 0;
    }

    /// @notice The leaf of an account's cumulative amount: keccak256(keccak256(abi.encode(LEAF_DOMAIN, chain id, this
    /// contract, account, token, cumulative))).
    function leafHash(address account, uint256 cumulative) public view returns (bytes32) {
        return IndexedMerkle.leafOf(
            abi.encode(LEAF_DOMAIN, block.chainid, address(this), account, address(TOKEN), cumulative)
        );
    }

    /// @notice The EIP-712 domain separator of `claimFor`.
    function domainSeparator() external view returns (bytes32) {
        return _domainSeparatorV4();
    }

    function _claim(Claim calldata entry, address recipient) private returns (uint256 amount) {
        Totals memory totals_ = _totals;
        uint64 epoch = entry.epoch;
        if (epoch == 0 || epoch > totals_.epoch || totals_.epoch - epoch > 1) {
            revert EpochNotClaimable(epoch, totals_.epoch);
        }
        address account = entry.account;
        uint256 cumulative = entry.cumulative;
        bytes32 root = IndexedMerkle.rootOf(leafHash(account, cumulative), entry.index, entry.proof);
        if (root != finalizedRoot[epoch]) revert InvalidProof(account, cumulative, entry.index);

        uint256 before = claimed[account];
        if (cumulative <= before) revert NothingToClaim(cumulative, before);
        amount = cumulative - before;
        uint256 unclaimed = totals_.finalized - totals_.claimed;
        if (amount > unclaimed) revert ExceedsFinalized(amount, unclaimed);

        claimed[account] = cumulative;
        _totals.claimed = totals_.claimed + amount.toUint112();
        emit Claimed(account, epoch, recipient, amount, cumulative);
        TOKEN.safeTransfer(recipient, amount);
    }

    function _openProposal(uint64 epoch, bytes32 payoutRoot, Status status)
        private
        view
        returns (Proposal storage open)
    {
        open = _proposal;
        if (open.status != status || open.epoch != epoch || open.payoutRoot != payoutRoot) {
            revert NoSuchProposal(epoch, payoutRoot, status);
        }
    }

    function _requireSolvent(uint256 required) private view {
        uint256 balance = TOKEN.balanceOf(address(this));
        if (balance < required) revert Insolvent(balance, required);
    }

    function _setTerms(Terms memory terms_) private {
        _requireWindow(terms_.challengeWindow);
        _requireWindow(terms_.arbitrationWindow);
        _terms = terms_;
        emit TermsSet(terms_.bond, terms_.challengeWindow, terms_.arbitrationWindow);
    }

    function _requireWindow(uint256 window) private pure {
        if (window == 0 || window > WINDOW_MAX) revert WindowOutOfRange(window, 1, WINDOW_MAX);
    }
}
