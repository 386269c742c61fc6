// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {AccessControl} from "@openzeppelin/contracts/access/AccessControl.sol";
import {DatanetRegistry} from "./DatanetRegistry.sol";

/// @title ModelRegistry: base models, adapter generations and where they come from
/// @notice A generation is named by the hash of its content, never by a name that could come to mean something else. Its
/// parents and the snapshots it was trained on must be registered before it, so lineage has no cycles and no holes.
/// @dev Registering is for registrars: they verified that the bytes have the hash. Open to all, whoever copied a hash from
/// a pending transaction would own the model.
contract ModelRegistry is AccessControl {
    /// @param owner Who is paid and may change what can change; the zero address for an unknown model.
    /// @param registeredAt Seconds since 1970.
    /// @param retired No longer offered; stays readable, and what descends from it stays valid.
    /// @param metadataHash Hash of its description.
    struct BaseModel {
        address owner;
        uint48 registeredAt;
        bool retired;
        bytes32 metadataHash;
    }

    /// @param owner Who is paid and may change what can change; the zero address for an unknown generation.
    /// @param registeredAt Seconds since 1970.
    /// @param depth Longest line of parents: 0 where there are none.
    /// @param retired No longer offered; stays readable, and what descends from it stays valid.
    /// @param base The base model it adapts.
    /// @param trainingManifestHash Hash of the training run's manifest; zero where there was none.
    /// @param metadataHash Hash of its description.
    struct Generation {
        address owner;
        uint48 registeredAt;
        uint32 depth;
        bool retired;
        bytes32 base;
        bytes32 trainingManifestHash;
        bytes32 metadataHash;
    }

    struct SnapshotRef {
        uint64 datanet;
        uint32 snapshot;
    }

    /// @notice May register models.
    bytes32 public constant REGISTRAR_ROLE = keccak256("REGISTRAR_ROLE");
    /// @notice Parents that a generation can have.
    uint256 public constant PARENTS_MAX = 8;
    /// @notice Snapshots that a generation can have been trained on.
    uint256 public constant SNAPSHOTS_MAX = 16;

    /// @notice Where snapshots are looked up.
    DatanetRegistry public immutable DATANETS;

    mapping(bytes32 base => BaseModel) private _bases;
    mapping(bytes32 generation => Generation) private _generations;
    mapping(bytes32 generation => bytes32[]) private _parents;
    mapping(bytes32 generation => SnapshotRef[]) private _snapshots;
    /// @notice Who may accept ownership of a base model or generation.
    mapping(bytes32 model => address) public nextOwner;

    event BaseRegistered(bytes32 indexed base, address indexed owner, bytes32 metadataHash);
    event GenerationRegistered(
        bytes32 indexed generation,
        bytes32 indexed base,
        address indexed owner,
        bytes32[] parents,
        SnapshotRef[] snapshots,
        bytes32 trainingManifestHash,
        bytes32 metadataHash
    );
    event Described(bytes32 indexed model, bytes32 metadataHash);
    event RetiredSet(bytes32 indexed model, bool retired);
    event OwnershipOffered(bytes32 indexed model, address indexed owner, address indexed nextOwner);
    event OwnershipTransferred(bytes32 indexed model, address indexed from, address indexed to);

    error ZeroHash();
    error ZeroAddress();
    error AlreadyRegistered(bytes32 model);
    error UnknownModel(bytes32 model);
    error UnknownBase(bytes32 base);
    error UnknownParent(bytes32 parent);
    error ParentOnOtherBase(bytes32 parent, bytes32 parentBase, bytes32 base);
    error ParentsNotAscending(bytes32 before, bytes32 after_);
    error SnapshotsNotAscending(uint64 datanet, uint32 snapshot);
    error UnknownSnapshot(uint64 datanet, uint32 snapshot);
    error TooManyParents(uint256 given, uint256 max);
    error TooManySnapshots(uint256 given, uint256 max);
    error NotOwner(bytes32 model, address caller);
    error NotNextOwner(bytes32 model, address caller);

    /// @param datanets Where snapshots are looked up.
    /// @param admin Administers the roles: the timelock.
    /// @param registrar First holder of REGISTRAR_ROLE; the zero address for none.
    constructor(DatanetRegistry datanets, address admin, address registrar) {
        if (address(datanets) == address(0) || admin == address(0)) revert ZeroAddress();
        DATANETS = datanets;
        _grantRole(DEFAULT_ADMIN_ROLE, admin);
        if (registrar != address(0)) _grantRole(REGISTRAR_ROLE, registrar);
    }

    /// @notice Registers a base model by the hash of its content. Only registrars; `ZeroHash`, `ZeroAddress`,
    /// `AlreadyRegistered` (as base or generation).
    function registerBase(bytes32 base, address owner, bytes32 metadataHash) external onlyRole(REGISTRAR_ROLE) {
        _requireNew(base, owner);
        _bases[base] = BaseModel(owner, uint48(block.timestamp), false, metadataHash);
        emit BaseRegistered(base, owner, metadataHash);
    }

    /// @notice Registers an adapter generation by the hash of its content. Only registrars; `ZeroHash`, `ZeroAddress`,
    /// `AlreadyRegistered` (as base or generation).
    /// @param base Registered (`UnknownBase`).
    /// @param parents Generations it was made from: registered (`UnknownParent`), on the same base (`ParentOnOtherBase`),
    /// strictly ascending (`ParentsNotAscending`), at most `PARENTS_MAX` (`TooManyParents`).
    /// @param snapshots What it was trained on: taken (`UnknownSnapshot`), strictly ascending by Datanet, then number
    /// (`SnapshotsNotAscending`), at most `SNAPSHOTS_MAX` (`TooManySnapshots`).
    function registerGeneration(
        bytes32 generation,
        bytes32 base,
        address owner,
        bytes32[] calldata parents,
        SnapshotRef[] calldata snapshots,
        bytes32 trainingManifestHash,
        bytes32 metadataHash
    ) external onlyRole(REGISTRAR_ROLE) {
        _requireNew(generation, owner);
        if (_bases[base].owner == address(0)) revert UnknownBase(base);
        uint32 depth = _keepParents(generation, base, parents);
        _keepSnapshots(generation, snapshots);
        _generations[generation] =
            Generation(owner, uint48(block.timestamp), depth, false, base, trainingManifestHash, metadataHash);
        emit GenerationRegistered(generation, base, owner, parents, snapshots, trainingManifestHash, metadataHash);
    }

    /// @notice Replaces the description. Only the owner (`NotOwner`).
    function describe(bytes32 model, bytes32 metadataHash) external {
        _requireOwner(model);
        if (_isBase(model)) _bases[model].metadataHash = metadataHash;
        else _generations[model].metadataHash = metadataHash;
        emit Described(model, metadataHash);
    }

    /// @notice Says that a model is no longer offered, or is again. Only the owner (`NotOwner`).
    function setRetired(bytes32 model, bool retired) external {
        _requireOwner(model);
        if (_isBase(model)) _bases[model].retired = retired;
        else _generations[model].retired = retired;
        emit RetiredSet(model, retired);
    }

    /// @notice Offers a model to `to`, who has to accept; the zero address takes an offer back. Only the owner (`NotOwner`).
    function offerOwnership(bytes32 model, address to) external {
        _requireOwner(model);
        nextOwner[model] = to;
        emit OwnershipOffered(model, msg.sender, to);
    }

    /// @notice Accepts an offered model; `NotNextOwner` for anyone else.
    function acceptOwnership(bytes32 model) external {
        if (nextOwner[model] != msg.sender) revert NotNextOwner(model, msg.sender);
        emit OwnershipTransferred(model, ownerOf(model), msg.sender);
        delete nextOwner[model];
        if (_isBase(model)) _bases[model].owner = msg.sender;
        else _generations[model].owner = msg.sender;
    }

    /// @notice Owner of a base model or generation; the zero address for an unknown one.
    function ownerOf(bytes32 model) public view returns (address) {
        return _isBase(model) ? _bases[model].owner : _generations[model].owner;
    }

    /// @notice A base model; all zero for an unknown one.
    function getBase(bytes32 base) external view returns (BaseModel memory) {
        return _bases[base];
    }

    /// @notice A generation; all zero for an unknown one.
    function getGeneration(bytes32 generation) external view returns (Generation memory) {
        return _generations[generation];
    }

    /// @notice The generations that one was made from, ascending.
    function parentsOf(bytes32 generation) external view returns (bytes32[] memory) {
        return _parents[generation];
    }

    /// @notice The snapshots that a generation was trained on, ascending.
    function snapshotsOf(bytes32 generation) external view returns (SnapshotRef[] memory) {
        return _snapshots[generation];
    }

    function _keepParents(bytes32 generation, bytes32 base, bytes32[] calldata parents) private returns (uint32 depth) {
        if (parents.length > PARENTS_MAX) revert TooManyParents(parents.length, PARENTS_MAX);
        bytes32 before = 0;
        for (uint256 i = 0; i < parents.length; ++i) {
            bytes32 parent = parents[i];
            if (parent <= before) revert ParentsNotAscending(before, parent);
            Generation storage of_ = _generations[parent];
            if (of_.owner == address(0)) revert UnknownParent(parent);
            if (of_.base != base) revert ParentOnOtherBase(parent, of_.base, base);
            if (of_.depth >= depth) depth = of_.depth + 1;
            before = parent;
        }
        _parents[generation] = parents;
    }

    function _keepSnapshots(bytes32 generation, SnapshotRef[] calldata snapshots) private {
        if (snapshots.length > SNAPSHOTS_MAX) revert TooManySnapshots(snapshots.length, SNAPSHOTS_MAX);
        uint256 before = 0;
        for (uint256 i = 0; i < snapshots.length; ++i) {
            SnapshotRef calldata ref = snapshots[i];
            uint256 place = uint256(ref.datanet) << 32 | ref.snapshot;
            if (place <= before) revert SnapshotsNotAscending(ref.datanet, ref.snapshot);
            if (DATANETS.getSnapshot(ref.datanet, ref.snapshot).root == 0) {
                revert UnknownSnapshot(ref.datanet, ref.snapshot);
            }
            before = place;
            _snapshots[generation].push(ref);
        }
    }

    function _isBase(bytes32 model) private view returns (bool) {
        return _bases[model].owner != address(0);
    }

    function _requireNew(bytes32 model, address owner) private view {
        if (model == 0) revert ZeroHash();
        if (owner == address(0)) revert ZeroAddress();
        if (ownerOf(model) != address(0)) revert AlreadyRegistered(model);
    }

    function _requireOwner(bytes32 model) private view {
        address owner = ownerOf(model);
        if (owner == address(0)) revert UnknownModel(model);
        if (owner != msg.sender) revert NotOwner(model, msg.sender);
    }
}
