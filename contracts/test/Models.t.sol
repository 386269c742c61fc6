// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IAccessControl} from "@openzeppelin/contracts/access/IAccessControl.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {DatanetRegistry} from "../src/DatanetRegistry.sol";
import {ModelRegistry} from "../src/ModelRegistry.sol";
import {Test} from "./support/Test.sol";

/// Models: identity is content, and lineage has neither holes nor cycles.
contract ModelsTest is Test {
    bytes32 private constant BASE = keccak256("base");
    bytes32 private constant OTHER_BASE = keccak256("other base");
    bytes32 private constant MANIFEST = keccak256("manifest");
    bytes32 private constant METADATA = keccak256("metadata");

    address private admin = address(0xad);
    address private registrar = address(0x4e);
    address private owner = address(0x0e);
    address private anyone = address(0xee);

    DatanetRegistry private datanets;
    ModelRegistry private models;

    function setUp() public {
        vm.warp(1_800_000_000);
        datanets = new DatanetRegistry(IERC20(address(1)), admin, address(0), DatanetRegistry.Terms(0, 1, 0));
        models = new ModelRegistry(datanets, admin, registrar);
        uint64 datanet = datanets.createDatanet(0, METADATA);
        datanets.commitBatch(datanet, 1, keccak256("batch"), 1);
        datanets.takeSnapshot(datanet, 1, keccak256("snapshot 1"), METADATA, 1);
        datanets.takeSnapshot(datanet, 2, keccak256("snapshot 2"), METADATA, 1);
        vm.prank(registrar);
        models.registerBase(BASE, owner, METADATA);
    }

    function test_a_generation_keeps_its_base_parents_snapshots_and_manifest() public {
        register(bytes32(uint256(1)), BASE, none(), noSnapshots());
        register(bytes32(uint256(2)), BASE, one(1), noSnapshots());
        bytes32[] memory parents = two(1, 2);
        ModelRegistry.SnapshotRef[] memory snapshots = twoSnapshots(1, 1, 1, 2);
        vm.expectEmit(true, true, true, true, address(models));
        emit ModelRegistry.GenerationRegistered(
            bytes32(uint256(3)), BASE, owner, parents, snapshots, MANIFEST, METADATA
        );
        register(bytes32(uint256(3)), BASE, parents, snapshots);

        ModelRegistry.Generation memory kept = models.getGeneration(bytes32(uint256(3)));
        vm.assertEq(kept.base, BASE);
        vm.assertEq(kept.owner, owner);
        vm.assertEq(kept.trainingManifestHash, MANIFEST);
        vm.assertEq(kept.depth, 2);
        vm.assertEq(models.getGeneration(bytes32(uint256(1))).depth, 0);
        vm.assertEq(models.parentsOf(bytes32(uint256(3))).length, 2);
        vm.assertEq(models.parentsOf(bytes32(uint256(3)))[1], bytes32(uint256(2)));
        vm.assertEq(models.snapshotsOf(bytes32(uint256(3)))[1].snapshot, 2);
    }

    function test_a_hash_is_registered_once_as_base_or_generation() public {
        register(bytes32(uint256(1)), BASE, none(), noSnapshots());
        expectRevert(alreadyRegistered(bytes32(uint256(1))), bytes32(uint256(1)), BASE, none(), noSnapshots());
        expectRevert(alreadyRegistered(BASE), BASE, BASE, none(), noSnapshots());
        vm.startPrank(registrar);
        vm.expectRevert(alreadyRegistered(BASE));
        models.registerBase(BASE, owner, METADATA);
        vm.expectRevert(alreadyRegistered(bytes32(uint256(1))));
        models.registerBase(bytes32(uint256(1)), owner, METADATA);
        vm.expectRevert(abi.encodeWithSelector(ModelRegistry.ZeroHash.selector));
        models.registerBase(0, owner, METADATA);
        vm.expectRevert(abi.encodeWithSelector(ModelRegistry.ZeroAddress.selector));
        models.registerBase(OTHER_BASE, address(0), METADATA);
        vm.stopPrank();
    }

    function test_lineage_has_no_holes_and_stays_on_its_base() public {
        bytes32 g = bytes32(uint256(9));
        expectRevert(
            abi.encodeWithSelector(ModelRegistry.UnknownBase.selector, OTHER_BASE), g, OTHER_BASE, none(), noSnapshots()
        );
        expectRevert(
            abi.encodeWithSelector(ModelRegistry.UnknownParent.selector, bytes32(uint256(1))),
            g,
            BASE,
            one(1),
            noSnapshots()
        );
        // Not even its own parent.
        expectRevert(abi.encodeWithSelector(ModelRegistry.UnknownParent.selector, g), g, BASE, one(9), noSnapshots());
        expectRevert(
            abi.encodeWithSelector(ModelRegistry.UnknownSnapshot.selector, 1, 3),
            g,
            BASE,
            none(),
            twoSnapshots(1, 1, 1, 3)
        );
        expectRevert(
            abi.encodeWithSelector(ModelRegistry.UnknownSnapshot.selector, 2, 1),
            g,
            BASE,
            none(),
            twoSnapshots(1, 1, 2, 1)
        );
        vm.prank(registrar);
        models.registerBase(OTHER_BASE, owner, METADATA);
        register(bytes32(uint256(1)), OTHER_BASE, none(), noSnapshots());
        expectRevert(
            abi.encodeWithSelector(ModelRegistry.ParentOnOtherBase.selector, bytes32(uint256(1)), OTHER_BASE, BASE),
            g,
            BASE,
            one(1),
            noSnapshots()
        );
    }

    function test_parents_and_snapshots_are_ascending_without_repeats_and_bounded() public {
        register(bytes32(uint256(1)), BASE, none(), noSnapshots());
        register(bytes32(uint256(2)), BASE, none(), noSnapshots());
        bytes32 g = bytes32(uint256(9));
        bytes4 parentsOrder = ModelRegistry.ParentsNotAscending.selector;
        expectRevert(
            abi.encodeWithSelector(parentsOrder, bytes32(uint256(2)), bytes32(uint256(1))),
            g,
            BASE,
            two(2, 1),
            noSnapshots()
        );
        expectRevert(
            abi.encodeWithSelector(parentsOrder, bytes32(uint256(1)), bytes32(uint256(1))),
            g,
            BASE,
            two(1, 1),
            noSnapshots()
        );
        bytes4 snapshotsOrder = ModelRegistry.SnapshotsNotAscending.selector;
        expectRevert(abi.encodeWithSelector(snapshotsOrder, 1, 1), g, BASE, none(), twoSnapshots(1, 2, 1, 1));
        expectRevert(abi.encodeWithSelector(snapshotsOrder, 1, 1), g, BASE, none(), twoSnapshots(1, 1, 1, 1));
        expectRevert(abi.encodeWithSelector(snapshotsOrder, 0, 0), g, BASE, none(), twoSnapshots(0, 0, 1, 1));
        expectRevert(
            abi.encodeWithSelector(ModelRegistry.TooManyParents.selector, 9, 8),
            g,
            BASE,
            new bytes32[](9),
            noSnapshots()
        );
        expectRevert(
            abi.encodeWithSelector(ModelRegistry.TooManySnapshots.selector, 17, 16),
            g,
            BASE,
            none(),
            new ModelRegistry.SnapshotRef[](17)
        );
        vm.assertEq(models.ownerOf(g), address(0));
        vm.assertEq(models.snapshotsOf(g).length, 0);
    }

    function test_only_registrars_register() public {
        vm.startPrank(owner);
        vm.expectPartialRevert(IAccessControl.AccessControlUnauthorizedAccount.selector);
        models.registerBase(OTHER_BASE, owner, METADATA);
        vm.expectPartialRevert(IAccessControl.AccessControlUnauthorizedAccount.selector);
        models.registerGeneration(OTHER_BASE, BASE, owner, none(), noSnapshots(), MANIFEST, METADATA);
        vm.stopPrank();
    }

    function test_the_owner_describes_retires_and_hands_over_and_nobody_else() public {
        bytes32 g = bytes32(uint256(1));
        register(g, BASE, none(), noSnapshots());
        bytes32[2] memory both = [BASE, g];
        for (uint256 i = 0; i < 2; ++i) {
            bytes32 model = both[i];
            bytes memory refused = abi.encodeWithSelector(ModelRegistry.NotOwner.selector, model, anyone);
            vm.startPrank(anyone);
            vm.expectRevert(refused);
            models.describe(model, 0);
            vm.expectRevert(refused);
            models.setRetired(model, true);
            vm.expectRevert(refused);
            models.offerOwnership(model, anyone);
            vm.expectRevert(abi.encodeWithSelector(ModelRegistry.NotNextOwner.selector, model, anyone));
            models.acceptOwnership(model);
            vm.stopPrank();
            vm.startPrank(owner);
            models.describe(model, keccak256("new"));
            models.setRetired(model, true);
            models.offerOwnership(model, anyone);
            vm.assertEq(models.ownerOf(model), owner);
            vm.stopPrank();
            vm.prank(anyone);
            models.acceptOwnership(model);
            vm.assertEq(models.ownerOf(model), anyone);
        }
        vm.assertTrue(models.getBase(BASE).retired && models.getGeneration(g).retired, "retired");
        vm.assertEq(models.getBase(BASE).metadataHash, keccak256("new"));
        vm.assertEq(models.getGeneration(g).metadataHash, keccak256("new"));
        vm.expectRevert(abi.encodeWithSelector(ModelRegistry.UnknownModel.selector, MANIFEST));
        models.describe(MANIFEST, 0);
    }

    function register(
        bytes32 generation,
        bytes32 base,
        bytes32[] memory parents,
        ModelRegistry.SnapshotRef[] memory snapshots
    ) private {
        vm.prank(registrar);
        models.registerGeneration(generation, base, owner, parents, snapshots, MANIFEST, METADATA);
    }

    function expectRevert(
        bytes memory reason,
        bytes32 generation,
        bytes32 base,
        bytes32[] memory parents,
        ModelRegistry.SnapshotRef[] memory snapshots
    ) private {
        vm.expectRevert(reason);
        register(generation, base, parents, snapshots);
    }

    function alreadyRegistered(bytes32 model) private pure returns (bytes memory) {
        return abi.encodeWithSelector(ModelRegistry.AlreadyRegistered.selector, model);
    }

    function none() private pure returns (bytes32[] memory) {
        return new bytes32[](0);
    }

    function one(uint256 a) private pure returns (bytes32[] memory list) {
        list = new bytes32[](1);
        list[0] = bytes32(a);
    }

    function two(uint256 a, uint256 b) private pure returns (bytes32[] memory list) {
        list = new bytes32[](2);
        (list[0], list[1]) = (bytes32(a), bytes32(b));
    }

    function noSnapshots() private pure returns (ModelRegistry.SnapshotRef[] memory) {
        return new ModelRegistry.SnapshotRef[](0);
    }

    function twoSnapshots(uint64 d1, uint32 s1, uint64 d2, uint32 s2)
        private
        pure
        returns (ModelRegistry.SnapshotRef[] memory list)
    {
        list = new ModelRegistry.SnapshotRef[](2);
        list[0] = ModelRegistry.SnapshotRef(d1, s1);
        list[1] = ModelRegistry.SnapshotRef(d2, s2);
    }
}
