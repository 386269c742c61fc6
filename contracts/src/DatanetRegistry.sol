// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {AccessControl} from "@openzeppelin/contracts/access/AccessControl.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";
import {BondVault} from "./BondVault.sol";
import {IndexedMerkle} from "./libraries/IndexedMerkle.sol";

/// @title DatanetRegistry: who contributed what to which Datanet, when, under which licence
/// @notice A curator opens a Datanet, commits contributions in batches (one Merkle root each, so that the earliest
/// commitment of a datum can be shown), freezes snapshots that models are trained on, and keeps a stake. Anyone may
/// dispute a batch with a bond; the arbiter rules and may take a part of the stake. Nothing is slashed automatically.
/// @dev Batches and snapshots are numbered from 1 without gaps. The number is named in the call, so a retry is harmless.
/// Stake is in units of `TOKEN`, bonds are wei, times are seconds. Documents are named by hash and kept elsewhere. A caller
/// without the role that a function names meets `AccessControlUnauthorizedAccount`.
contract DatanetRegistry is AccessControl, BondVault {
    using SafeCast for uint256;
    using SafeERC20 for IERC20;

    /// @param owner The curator; the zero address for a Datanet that does not exist.
    /// @param batches Number of the last batch.
    /// @param snapshots Number of the last snapshot.
    /// @param openDisputes Batches under dispute; while there are any, no stake leaves.
    /// @param nextOwner Who may accept ownership.
    /// @param unstakableAt When `unstaking` can be withdrawn.
    /// @param stake Units at stake, including `unstaking`.
    /// @param unstaking Units whose withdrawal has been asked for.
    /// @param licenceHash Hash of the licence's text.
    /// @param metadataHash Hash of the Datanet's description.
    struct Datanet {
        address owner;
        uint32 batches;
        uint32 snapshots;
        uint32 openDisputes;
        address nextOwner;
        uint48 unstakableAt;
        uint128 stake;
        uint128 unstaking;
        bytes32 licenceHash;
        bytes32 metadataHash;
    }

    enum BatchState {
        None,
        Committed,
        Disputed,
        Rejected
    }

    /// @param root Root of the batch's tree of `contributionLeaf`s.
    /// @param count Leaves.
    /// @param committedAt Seconds since 1970.
    struct Batch {
        bytes32 root;
        uint32 count;
        uint48 committedAt;
        BatchState state;
    }

    /// @param root Root over the contributions in it.
    /// @param metadataHash Hash of its description (counts, checks and their versions, licence).
    /// @param throughBatch Holds contributions of batches up to this one, less rejected ones.
    /// @param takenAt Seconds since 1970.
    struct Snapshot {
        bytes32 root;
        bytes32 metadataHash;
        uint32 throughBatch;
        uint48 takenAt;
    }

    /// @param disputer Who posted the bond.
    /// @param bond Wei.
    /// @param resolvableUntil When the arbiter's time is up.
    struct Dispute {
        address disputer;
        uint96 bond;
        uint48 resolvableUntil;
    }

    /// @param bond Wei that a dispute costs.
    /// @param arbitrationWindow Seconds that the arbiter has.
    /// @param unstakeDelay Seconds from asking for stake to withdrawing it.
    struct Terms {
        uint96 bond;
        uint32 arbitrationWindow;
        uint32 unstakeDelay;
    }

    /// @notice Rules on disputes.
    bytes32 public constant ARBITER_ROLE = keccak256("ARBITER_ROLE");
    /// @notice First word of every contribution leaf's preimage.
    bytes32 public constant LEAF_DOMAIN = keccak256("OpenLoRA.DatanetRegistry.Contribution.v1");
    /// @notice The longest that a window can be set to.
    uint256 public constant WINDOW_MAX = 30 days;

    /// @notice What is staked.
    IERC20 public immutable TOKEN;

    /// @notice Number of the last Datanet; they are numbered from 1.
    uint64 public datanets;
    /// @notice Accounts that may commit batches beside the owner.
    mapping(uint64 datanet => mapping(address account => bool)) public isCommitter;
    /// @notice Batch in which a root was committed to a Datanet; 0 for none. A root is committed once.
    mapping(uint64 datanet => mapping(bytes32 root => uint32)) public batchOfRoot;
    /// @notice Units of `TOKEN` that an account can withdraw from slashed stakes.
    mapping(address account => uint256) public slashCredit;

    Terms private _terms;
    mapping(uint64 datanet => Datanet) private _datanets;
    mapping(uint64 datanet => mapping(uint32 number => Batch)) private _batches;
    mapping(uint64 datanet => mapping(uint32 number => Snapshot)) private _snapshots;
    mapping(uint64 datanet => mapping(uint32 batch => Dispute)) private _disputes;

    event DatanetCreated(uint64 indexed datanet, address indexed owner, bytes32 licenceHash, bytes32 metadataHash);
    event DatanetDescribed(uint64 indexed datanet, bytes32 licenceHash, bytes32 metadataHash);
    event OwnershipOffered(uint64 indexed datanet, address indexed owner, address indexed nextOwner);
    event OwnershipTransferred(uint64 indexed datanet, address indexed from, address indexed to);
    event CommitterSet(uint64 indexed datanet, address indexed account, bool allowed);
    event BatchCommitted(
        uint64 indexed datanet, uint32 indexed batch, bytes32 indexed root, uint32 count, address committer
    );
    event SnapshotTaken(
        uint64 indexed datanet, uint32 indexed snapshot, bytes32 indexed root, bytes32 metadataHash, uint32 throughBatch
    );
    event Staked(uint64 indexed datanet, address indexed from, uint256 amount);
    event UnstakeRequested(uint64 indexed datanet, uint256 amount, uint64 unstakableAt);
    event Unstaked(uint64 indexed datanet, address indexed to, uint256 amount);
    event Disputed(
        uint64 indexed datanet,
        uint32 indexed batch,
        address indexed disputer,
        bytes32 evidenceHash,
        uint64 resolvableUntil
    );
    event DisputeUpheld(uint64 indexed datanet, uint32 indexed batch, uint256 slashed);
    event DisputeDismissed(uint64 indexed datanet, uint32 indexed batch);
    event DisputeExpired(uint64 indexed datanet, uint32 indexed batch);
    event SlashWithdrawn(address indexed account, address indexed to, uint256 amount);
    event TermsSet(uint256 bond, uint256 arbitrationWindow, uint256 unstakeDelay);

    error NotOwner(uint64 datanet, address caller);
    error NotNextOwner(uint64 datanet, address caller);
    error NotCommitter(uint64 datanet, address caller);
    error UnknownDatanet(uint64 datanet);
    error WrongBatch(uint32 given, uint32 required);
    error WrongSnapshot(uint32 given, uint32 required);
    error BatchNotThere(uint32 given, uint32 last);
    error WrongBatchState(uint32 batch, BatchState state, BatchState required);
    error WrongDisputer(address given, address disputer);
    error RootAlreadyCommitted(bytes32 root, uint32 batch);
    error EmptyRoot();
    error EmptyBatch();
    error NothingReceived();
    error StakeTooLarge(uint256 given, uint256 max);
    error ExceedsStake(uint256 given, uint256 stake);
    error NothingToWithdraw(uint64 datanet);
    error NoSlashCredit(address account);
    error UnstakeNotDue(uint256 timestamp, uint256 unstakableAt);
    error DisputesOpen(uint64 datanet, uint32 count);
    error ArbitrationOver(uint256 timestamp, uint256 resolvableUntil);
    error ArbitrationOpen(uint256 timestamp, uint256 resolvableUntil);
    error WindowOutOfRange(uint256 given, uint256 min, uint256 max);

    modifier onlyOwner(uint64 datanet) {
        if (_datanets[datanet].owner != msg.sender) revert NotOwner(datanet, msg.sender);
        _;
    }

    /// @param token What is staked.
    /// @param admin Administers roles and terms: the timelock. Also receives forfeited bonds and half of what is slashed.
    /// @param arbiter First holder of ARBITER_ROLE; the zero address for none.
    /// @param terms_ Bond, window and delay; reverts with `WindowOutOfRange` as `setTerms` does.
    constructor(IERC20 token, address admin, address arbiter, Terms memory terms_) BondVault(admin) {
        if (address(token) == address(0)) revert ZeroAddress();
        TOKEN = token;
        _grantRole(DEFAULT_ADMIN_ROLE, admin);
        if (arbiter != address(0)) _grantRole(ARBITER_ROLE, arbiter);
        _setTerms(terms_);
    }

    // Datanets

    /// @notice Opens a Datanet owned by the caller.
    /// @return datanet Its number.
    function createDatanet(bytes32 licenceHash, bytes32 metadataHash) external returns (uint64 datanet) {
        datanet = ++datanets;
        Datanet storage created = _datanets[datanet];
        created.owner = msg.sender;
        created.licenceHash = licenceHash;
        created.metadataHash = metadataHash;
        emit DatanetCreated(datanet, msg.sender, licenceHash, metadataHash);
    }

    /// @notice Replaces licence and description for what comes; batches and snapshots keep the ones of their time, which
    /// the events show. Only the owner (`NotOwner`).
    function describe(uint64 datanet, bytes32 licenceHash, bytes32 metadataHash) external onlyOwner(datanet) {
        _datanets[datanet].licenceHash = licenceHash;
        _datanets[datanet].metadataHash = metadataHash;
        emit DatanetDescribed(datanet, licenceHash, metadataHash);
    }

    /// @notice Offers the Datanet and its stake to `nextOwner`, who has to accept; the zero address takes an offer back.
    /// Only the owner (`NotOwner`).
    function offerOwnership(uint64 datanet, address nextOwner) external onlyOwner(datanet) {
        _datanets[datanet].nextOwner = nextOwner;
        emit OwnershipOffered(datanet, msg.sender, nextOwner);
    }

    /// @notice Accepts an offered Datanet; `NotNextOwner` for anyone else.
    function acceptOwnership(uint64 datanet) external {
        Datanet storage offered = _datanets[datanet];
        if (offered.nextOwner != msg.sender) revert NotNextOwner(datanet, msg.sender);
        emit OwnershipTransferred(datanet, offered.owner, msg.sender);
        offered.owner = msg.sender;
        offered.nextOwner = address(0);
    }

    /// @notice Lets `account` commit batches, or not any more. Only the owner (`NotOwner`).
    function setCommitter(uint64 datanet, address account, bool allowed) external onlyOwner(datanet) {
        isCommitter[datanet][account] = allowed;
        emit CommitterSet(datanet, account, allowed);
    }

    // Contributions and snapshots

    /// @notice Commits contributions by the root of their tree. Only the owner or a committer (`NotCommitter`).
    /// @param batch Last batch + 1, else `WrongBatch`.
    /// @param root Not zero (`EmptyRoot`), not committed to this Datanet before (`RootAlreadyCommitted`).
    /// @param count Contributions in it, at least one (`EmptyBatch`).
    function commitBatch(uint64 datanet, uint32 batch, bytes32 root, uint32 count) external {
        Datanet storage into = _datanets[datanet];
        if (into.owner != msg.sender && !isCommitter[datanet][msg.sender]) revert NotCommitter(datanet, msg.sender);
        uint32 required = into.batches + 1;
        if (batch != required) revert WrongBatch(batch, required);
        if (root == 0) revert EmptyRoot();
        if (count == 0) revert EmptyBatch();
        uint32 earlier = batchOfRoot[datanet][root];
        if (earlier != 0) revert RootAlreadyCommitted(root, earlier);
        into.batches = batch;
        batchOfRoot[datanet][root] = batch;
        _batches[datanet][batch] = Batch(root, count, uint48(block.timestamp), BatchState.Committed);
        emit BatchCommitted(datanet, batch, root, count, msg.sender);
    }

    /// @notice Freezes a version that models can be trained on. Only the owner (`NotOwner`).
    /// @param snapshot Last snapshot + 1, else `WrongSnapshot`.
    /// @param root Not zero (`EmptyRoot`).
    /// @param throughBatch A batch that is there (`BatchNotThere`).
    function takeSnapshot(uint64 datanet, uint32 snapshot, bytes32 root, bytes32 metadataHash, uint32 throughBatch)
        external
        onlyOwner(datanet)
    {
        Datanet storage of_ = _datanets[datanet];
        uint32 required = of_.snapshots + 1;
        if (snapshot != required) revert WrongSnapshot(snapshot, required);
        if (root == 0) revert EmptyRoot();
        if (throughBatch == 0 || throughBatch > of_.batches) revert BatchNotThere(throughBatch, of_.batches);
        of_.snapshots = snapshot;
        _snapshots[datanet][snapshot] = Snapshot(root, metadataHash, throughBatch, uint48(block.timestamp));
        emit SnapshotTaken(datanet, snapshot, root, metadataHash, throughBatch);
    }

    // Stake

    /// @notice Adds to a Datanet's stake from the caller's approved tokens; it belongs to the owner from then on.
    /// `UnknownDatanet`, `NothingReceived`, `StakeTooLarge` above 2^128 - 1.
    /// @return received Units that arrived, less than `amount` where the token takes a fee.
    function stake(uint64 datanet, uint256 amount) external nonReentrant returns (uint256 received) {
        Datanet storage staked = _datanets[datanet];
        if (staked.owner == address(0)) revert UnknownDatanet(datanet);
        uint256 before = TOKEN.balanceOf(address(this));
        TOKEN.safeTransferFrom(msg.sender, address(this), amount);
        received = TOKEN.balanceOf(address(this)) - before;
        if (received == 0) revert NothingReceived();
        uint256 total = staked.stake + received;
        if (total > type(uint128).max) revert StakeTooLarge(total, type(uint128).max);
        staked.stake = total.toUint128();
        emit Staked(datanet, msg.sender, received);
    }

    /// @notice Asks for stake back; a second call replaces the first and its time. Only the owner (`NotOwner`), at most
    /// the stake (`ExceedsStake`).
    function requestUnstake(uint64 datanet, uint128 amount) external onlyOwner(datanet) {
        Datanet storage staked = _datanets[datanet];
        if (amount > staked.stake) revert ExceedsStake(amount, staked.stake);
        uint48 unstakableAt = uint48(block.timestamp) + _terms.unstakeDelay;
        staked.unstaking = amount;
        staked.unstakableAt = unstakableAt;
        emit UnstakeRequested(datanet, amount, unstakableAt);
    }

    /// @notice Sends to `to` what was asked for, or what is left of it after slashing. Only the owner (`NotOwner`), after
    /// the delay (`UnstakeNotDue`), with no dispute open (`DisputesOpen`); `NothingToWithdraw` without a request.
    function unstake(uint64 datanet, address to) external onlyOwner(datanet) nonReentrant returns (uint256 amount) {
        Datanet storage staked = _datanets[datanet];
        if (staked.openDisputes != 0) revert DisputesOpen(datanet, staked.openDisputes);
        amount = staked.unstaking;
        if (amount == 0) revert NothingToWithdraw(datanet);
        if (block.timestamp < staked.unstakableAt) revert UnstakeNotDue(block.timestamp, staked.unstakableAt);
        staked.unstaking = 0;
        staked.stake -= amount.toUint128();
        emit Unstaked(datanet, to, amount);
        TOKEN.safeTransfer(to, amount);
    }

    // Disputes

    /// @notice Disputes a batch for the bond (`WrongBond`). Open to anyone, for a committed batch (`WrongBatchState`).
    /// @param evidenceHash Hash of the reason; published, not interpreted.
    function dispute(uint64 datanet, uint32 batch, bytes32 evidenceHash) external payable {
        Batch storage disputed = _batchIn(datanet, batch, BatchState.Committed);
        Terms memory terms_ = _terms;
        if (msg.value != terms_.bond) revert WrongBond(msg.value, terms_.bond);
        uint48 resolvableUntil = uint48(block.timestamp) + terms_.arbitrationWindow;
        disputed.state = BatchState.Disputed;
        _disputes[datanet][batch] = Dispute(msg.sender, terms_.bond, resolvableUntil);
        _datanets[datanet].openDisputes += 1;
        emit Disputed(datanet, batch, msg.sender, evidenceHash, resolvableUntil);
    }

    /// @notice The arbiter's ruling. Upheld: the batch is rejected for good, the disputer's bond is credited back, and
    /// `slash` units of the stake are credited half to the disputer, half to the treasury. Dismissed: the bond goes to
    /// the treasury and the batch stands. Only the arbiter; `WrongBatchState` unless disputed, `ArbitrationOver` when the time
    /// is up, `ExceedsStake`.
    /// @param disputer Must be who disputed (`WrongDisputer`): a ruling that took long must not meet another dispute.
    /// @param slash Units of stake to take; only with `upheld`.
    function resolve(uint64 datanet, uint32 batch, address disputer, bool upheld, uint128 slash)
        external
        onlyRole(ARBITER_ROLE)
    {
        Batch storage disputed = _batchIn(datanet, batch, BatchState.Disputed);
        Dispute memory open = _disputes[datanet][batch];
        if (open.disputer != disputer) revert WrongDisputer(disputer, open.disputer);
        if (block.timestamp >= open.resolvableUntil) revert ArbitrationOver(block.timestamp, open.resolvableUntil);
        _closeDispute(datanet, batch);
        if (upheld) {
            disputed.state = BatchState.Rejected;
            emit DisputeUpheld(datanet, batch, slash);
            _slash(datanet, disputer, slash);
            _creditBond(disputer, open.bond);
        } else {
            if (slash != 0) revert ExceedsStake(slash, 0);
            disputed.state = BatchState.Committed;
            emit DisputeDismissed(datanet, batch);
            _creditBond(TREASURY, open.bond);
        }
    }

    /// @notice Ends a dispute on which the arbiter did not rule in time (`ArbitrationOpen` before; `WrongBatchState` without
    /// one): the batch stands and the bond is credited back. Open to anyone.
    function expire(uint64 datanet, uint32 batch) external {
        Batch storage disputed = _batchIn(datanet, batch, BatchState.Disputed);
        Dispute memory open = _disputes[datanet][batch];
        if (block.timestamp < open.resolvableUntil) revert ArbitrationOpen(block.timestamp, open.resolvableUntil);
        _closeDispute(datanet, batch);
        disputed.state = BatchState.Committed;
        emit DisputeExpired(datanet, batch);
        _creditBond(open.disputer, open.bond);
    }

    /// @notice Sends everything credited to the caller from slashed stakes to `to`; `NoSlashCredit` where there is nothing.
    function withdrawSlash(address to) external nonReentrant returns (uint256 amount) {
        amount = slashCredit[msg.sender];
        if (amount == 0) revert NoSlashCredit(msg.sender);
        slashCredit[msg.sender] = 0;
        emit SlashWithdrawn(msg.sender, to, amount);
        TOKEN.safeTransfer(to, amount);
    }

    /// @notice Sets the terms of disputes and requests to come. Only the admin; `WindowOutOfRange` unless the arbiter's window
    /// is 1 second to `WINDOW_MAX` and the delay at most `WINDOW_MAX`.
    function setTerms(Terms calldata terms_) external onlyRole(DEFAULT_ADMIN_ROLE) {
        _setTerms(terms_);
    }

    // Views

    /// @notice The terms that the next dispute gets.
    function terms() external view returns (Terms memory) {
        return _terms;
    }

    /// @notice A Datanet; all zero for an unknown one.
    function getDatanet(uint64 datanet) external view returns (Datanet memory) {
        return _datanets[datanet];
    }

    /// @notice A batch; all zero for an unknown one.
    function getBatch(uint64 datanet, uint32 batch) external view returns (Batch memory) {
        return _batches[datanet][batch];
    }

    /// @notice A snapshot; all zero for an unknown one.
    function getSnapshot(uint64 datanet, uint32 snapshot) external view returns (Snapshot memory) {
        return _snapshots[datanet][snapshot];
    }

    /// @notice The open dispute of a batch; all zero where there is none.
    function getDispute(uint64 datanet, uint32 batch) external view returns (Dispute memory) {
        return _disputes[datanet][batch];
    }

    /// @notice The leaf of a contribution: keccak256(keccak256(abi.encode(LEAF_DOMAIN, chain id, this contract, datanet,
    /// contributor, hash of the content))).
    function contributionLeaf(uint64 datanet, address contributor, bytes32 contentHash) public view returns (bytes32) {
        return
            IndexedMerkle.leafOf(
                abi.encode(LEAF_DOMAIN, block.chainid, address(this), datanet, contributor, contentHash)
            );
    }

    /// @notice When a contribution was committed with `batch`; 0 where the proof does not show that it was. Rejected
    /// batches count: that they were rejected is their state, that they were committed stays true.
    /// @dev Reverts with `ProofTooLong` or `IndexOutsideTree`.
    function committedAt(
        uint64 datanet,
        uint32 batch,
        address contributor,
        bytes32 contentHash,
        uint256 index,
        bytes32[] calldata proof
    ) external view returns (uint256) {
        Batch memory in_ = _batches[datanet][batch];
        bytes32 root = IndexedMerkle.rootOf(contributionLeaf(datanet, contributor, contentHash), index, proof);
        return root == in_.root && index < in_.count ? in_.committedAt : 0;
    }

    function _batchIn(uint64 datanet, uint32 batch, BatchState required) private view returns (Batch storage found) {
        found = _batches[datanet][batch];
        if (found.state != required) revert WrongBatchState(batch, found.state, required);
    }

    function _closeDispute(uint64 datanet, uint32 batch) private {
        delete _disputes[datanet][batch];
        _datanets[datanet].openDisputes -= 1;
    }

    function _slash(uint64 datanet, address disputer, uint128 amount) private {
        if (amount == 0) return;
        Datanet storage slashed = _datanets[datanet];
        uint128 left = slashed.stake;
        if (amount > left) revert ExceedsStake(amount, left);
        left -= amount;
        slashed.stake = left;
        if (slashed.unstaking > left) slashed.unstaking = left;
        slashCredit[disputer] += amount / 2;
        slashCredit[TREASURY] += amount - amount / 2;
    }

    function _setTerms(Terms memory terms_) private {
        uint256 window = terms_.arbitrationWindow;
        if (window == 0 || window > WINDOW_MAX) revert WindowOutOfRange(window, 1, WINDOW_MAX);
        if (terms_.unstakeDelay > WINDOW_MAX) revert WindowOutOfRange(terms_.unstakeDelay, 0, WINDOW_MAX);
        _terms = terms_;
        emit TermsSet(terms_.bond, window, terms_.unstakeDelay);
    }
}
