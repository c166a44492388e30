"""Tasks beside labels: people's points and how they are read out of maps, and two classes of unequal size."""

from itertools import permutations

import numpy as np
import pytest
import torch

from lib import channels, data, pruning, recipes, shapes, training
from lib.constraint import attach_masks
from lib.data import FACE, FIGURE, DataError, Skeleton, Split
from lib.data.poses import _faces
from lib.data.skeletons import _greedy, _optimal
from lib.keys import content
from lib.models import ModelError, PoseNet

ARM = Skeleton(("shoulder", "elbow", "wrist"), ((0, 1), (1, 2)))
HERE = torch.tensor([[[[8.0, 8.0], [8.0, 24.0], [24.0, 24.0]]]])  # (1, 1, 3, 2)


@pytest.fixture(scope="module")
def figures():
    return data.poses(train_size=32, validation_size=8, test_size=40)


class TestMaps:
    def test_a_peak_is_one_where_the_point_is_and_nowhere_else(self):
        at = (HERE + 2).clone()  # the middle of a map's pixel
        heat = ARM.maps(at, (32, 32))[0, :3]
        assert heat.amax((1, 2)).tolist() == [1.0, 1.0, 1.0]
        assert [divmod(int(h.argmax()), 8) for h in heat] == [(2, 2), (6, 2), (6, 6)]

    def test_an_affinity_is_the_unit_vector_of_its_limb(self):
        x, y = ARM.maps(HERE, (32, 32))[0, 3:5]
        assert {*x.unique().tolist()} == {0.0}
        assert {*y.unique().tolist()} == {0.0, 1.0}
        far = torch.arange(8) > 3
        assert not y[:, far].any()
        assert not y[7:].any()

    def test_crossing_limbs_are_averaged_and_absent_points_leave_nothing(self):
        two = torch.tensor([[[[4.0, 16.0], [28.0, 16.0]], [[16.0, 4.0], [16.0, 28.0]]]])
        limb = Skeleton(("a", "b"), ((0, 1),))
        assert limb.maps(two, (32, 32))[0, 2:, 4, 4].tolist() == [0.5, 0.5]
        two[0, 1] = torch.nan
        assert torch.equal(limb.maps(two, (32, 32)), limb.maps(two[:, :1], (32, 32)))

    @pytest.mark.parametrize("name", ["heat", "affinities"])
    def test_what_should_be_said_has_no_loss_and_anything_else_has(self, name):
        maps = ARM.maps(HERE, (32, 32))
        assert ARM.loss(maps, HERE) == 0
        maps[0, 0 if name == "heat" else 4] += 0.1
        torch.testing.assert_close(ARM.loss(maps, HERE), torch.tensor(0.01 * 64 / 7))


class TestPeople:
    def test_nearly_all_are_read_out_of_what_should_be_said(self, figures):
        found, true, far, spare = FIGURE.errors(
            FIGURE.people(FIGURE.maps(figures.test.y, (64, 64))), figures.test.y
        ).sum(0)
        assert found / true > 0.98
        assert spare / true < 0.02
        assert far / found < 0.04

    def test_enlarging_maps_brings_points_nearer(self, figures):
        maps = FIGURE.maps(figures.test.y, (64, 64))
        far = [FIGURE.errors(FIGURE.people(maps, fine=n), figures.test.y).sum(0) for n in (1, 2)]
        assert far[1][2] / far[1][0] < 0.7 * far[0][2] / far[0][0]

    def test_crossed_arms_are_told_apart_by_affinities(self):
        """Each shoulder is nearer to the other's elbow."""
        left = torch.tensor([[6.0, 6.0], [26.0, 22.0], [28.0, 30.0]])
        both = torch.stack([left, left * torch.tensor([-1.0, 1.0]) + torch.tensor([32.0, 0.0])])[None]
        found = ARM.people(ARM.maps(both, (32, 32)))
        assert ARM.errors(found, both)[0, [0, 1, 3]].tolist() == [6.0, 6.0, 0.0]

    def test_greedy_takes_the_best_first_and_optimal_the_best_sum(self):
        worth = np.array([[0.9, 0.8], [0.8, 0.1]])
        assert {*_greedy(worth)} == {(0, 0), (1, 1)}
        assert {*_optimal(worth)} == {(0, 1), (1, 0)}
        for seed in range(20):
            worth = np.random.default_rng(seed).random((3, 4))
            best = max(sum(worth[i, j] for i, j in enumerate(p)) for p in permutations(range(4), 3))
            assert sum(worth[i, j] for i, j in _optimal(worth)) == pytest.approx(best)
            assert sum(worth[i, j] for i, j in _greedy(worth)) <= best + 1e-12

    def test_a_person_found_twice_counts_once_and_nobody_counts_as_spare(self):
        twice = [torch.cat([HERE[0], HERE[0] + 0.1])]
        assert ARM.errors(twice, HERE)[0].round(3).tolist() == [3.0, 3.0, 0.0, 3.0]
        assert ARM.errors([torch.empty(0, 3, 2)], HERE)[0].tolist() == [0.0, 3.0, 0.0, 0.0]

    def test_a_point_counts_within_a_tenth_of_its_person_s_box(self):
        for shift, hits in ((1.5, 1), (1.7, 0)):  # the box is 16 pixels long
            guess = HERE[0].clone()
            guess[0, 0, 0] += shift
            assert ARM.errors([guess], HERE)[0, 0] == 2 + hits

    @pytest.mark.parametrize("level", [-0.1, 0.0])
    def test_nothing_is_found_in_nothing(self, level):
        nothing = torch.full((2, 7, 8, 8), level)
        assert [len(people) for people in ARM.people(nothing)] == [0, 0]


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (HERE + 20, "image 0, person 0: the elbow at"),
        (HERE * torch.nan, "image 0 has nobody"),
        (torch.cat([HERE * torch.nan, HERE], 1), "person 0 has no points, but person 1 has"),
        (HERE[0], "is expected"),
    ],
)
def test_points_that_cannot_be_are_named(points, said):
    with pytest.raises(DataError, match=said):
        ARM.maps(points, (32, 32))


@pytest.mark.parametrize("limbs", [((0, 1),), ((1, 2), (0, 1)), ((0, 1), (0, 1), (1, 2)), ((0, 1), (1, 3))])
def test_limbs_are_a_tree(limbs):
    with pytest.raises(DataError, match="limb"):
        Skeleton(("a", "b", "c"), limbs)


class TestData:
    def test_figures_are_the_same_every_time_and_other_in_every_split(self, figures):
        again = data.poses(train_size=32, validation_size=8, test_size=40)
        assert again.checksum == figures.checksum
        assert content(again) == content(figures)
        assert not torch.equal(figures.train.x[:8], figures.validation.x)

    def test_there_are_one_to_three_whole_people(self, figures):
        there = ~figures.train.y[..., 0].isnan()
        assert {*there.all(2).sum(1).tolist()} == {1, 2, 3}
        assert torch.equal(there.all(2), there.any(2))

    def test_faces_are_read_cut_and_placed(self, tmp_path):
        (tmp_path / "faces").mkdir()
        rng = np.random.default_rng(0)
        for part in ("training", "test"):
            points = rng.uniform(16, 48, (10, 68, 2)).astype(np.float32)
            points[0, 8] = (-3, 20)  # a chin outside of its photograph
            np.savez(
                tmp_path / "faces" / f"faces68_{part}.npz",
                images=rng.integers(0, 255, (10, 64, 64), dtype=np.uint8),
                keypoints=points,
            )
        faces = data.poses("faces", tmp_path, side=96, people=2, train_size=20, validation_size=4, test_size=10)
        assert faces.train.y.shape == (20, 2, 10, 2)
        assert faces.classes == FACE.channels == 28
        people = ~faces.train.y[..., 0].isnan().all(2)
        assert (people.sum(1) >= 1).all()
        assert faces.train.y[people][:, 1].isnan().any()
        (file := tmp_path / "faces" / "faces68_test.npz").write_bytes(file.read_bytes()[:-200])
        with pytest.raises(DataError, match=r"faces68_test.npz cannot be read"):
            data.poses("faces", tmp_path, side=96)

    @pytest.mark.parametrize(
        ("images", "lost", "said"),
        [
            (np.zeros((3, 64, 64), np.float32), (), "holds images .* torch.float32"),
            (np.zeros((3, 64, 48), np.uint8), (), r"holds images \(3, 64, 48\)"),
            (np.zeros((3, 64, 64), np.uint8), (1, slice(None)), "image 1 of faces.npz has no point on it"),
        ],
    )
    def test_faces_that_cannot_be_are_named(self, images, lost, said, tmp_path):
        points = np.full((3, 68, 2), 20, np.float32)
        points[lost or slice(0)] = np.nan
        np.savez(tmp_path / "faces.npz", images=images, keypoints=points)
        with pytest.raises(DataError, match=said):
            _faces(tmp_path / "faces.npz")

    def test_half_a_point_is_none(self, tmp_path):
        points = np.full((1, 68, 2), 20, np.float32)
        points[0, 30, 1] = np.nan  # the nose has an x alone
        np.savez(tmp_path / "faces.npz", images=np.zeros((1, 64, 64), np.uint8), keypoints=points)
        assert _faces(tmp_path / "faces.npz")[1].isnan().all(-1).nonzero().tolist() == [[0, 0]]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"name": "cats"}, "'cats' are unknown"),
            ({"side": 30}, "side = 30"),
            ({"people": 5}, "room for 4"),
            ({"train_size": 0}, "train_size = 0"),
            ({"name": "faces"}, "faces68_training.npz cannot be read"),
        ],
    )
    def test_what_is_refused(self, options, said, tmp_path):
        with pytest.raises(DataError, match=said):
            data.poses(root=tmp_path, **options)


class TestIllness:
    def test_an_area_is_the_share_of_pairs_in_order(self):
        torch.manual_seed(0)
        margin, y = torch.randint(5, (40,)).double(), torch.randint(2, (40,))
        pairs = [(a, b) for a in margin[y == 1] for b in margin[y == 0]]
        share = sum(float(a > b) + 0.5 * float(a == b) for a, b in pairs) / len(pairs)
        for form in (margin, margin.exp(), 3 * margin - 7):
            area, of = data.auc(torch.stack([-form, form], 1), y)
            assert float(area / of) == pytest.approx(share)

    @pytest.mark.parametrize("score", [data.auc, data.balanced_accuracy])
    def test_one_class_alone_has_no_score(self, score):
        with pytest.raises(DataError, match="class"):
            score(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))

    def test_a_score_of_a_whole_split_does_not_depend_on_batches(self, images):
        two = Split(images.test.x, images.test.y % 2, data.illness)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 2))
        assert training.evaluate(net, two, batch_size=7) == training.evaluate(net, two)
        plain = Split(two.x, two.y)
        for score in (data.auc, data.balanced_accuracy):
            found = [training.evaluate(net, plain, batch_size=n, score=score) for n in (7, len(plain))]
            assert found[0] == found[1]

    def test_a_set_is_read_in_its_own_split(self, tmp_path):
        (tmp_path / "medical").mkdir()
        rng, file = np.random.default_rng(0), tmp_path / "medical" / "small.npz"
        parts = {
            f"{part}_{kind}": rng.integers(0, 255, (n, 8, 8, 3), dtype=np.uint8)
            if kind == "images"
            else np.arange(n, dtype=np.uint8)[:, None] % 2
            for part, n in (("train", 9), ("val", 5), ("test", 7))
            for kind in ("images", "labels")
        }
        np.savez(file, **parts)
        small = data.medmnist("small", tmp_path, train_size=6)
        assert [len(s) for s in (small.train, small.validation, small.test)] == [6, 5, 7]
        assert small.shape == (3, 8, 8)
        assert small.classes == 2
        assert small.task is data.illness
        assert small.train.x.mean().abs() < 1e-5
        assert abs(float(small.train.x[:, 0].std()) - 1) < 1e-4
        with pytest.raises(DataError, match="train: 10 images of 9"):
            data.medmnist("small", tmp_path, train_size=10)
        for damaged in (b"nothing", file.read_bytes()[:-200]):
            file.write_bytes(damaged)
            with pytest.raises(DataError, match="cannot be read"):
                data.medmnist("small", tmp_path)
        np.savez(file, **parts | {"test_images": np.zeros((7, 8, 8, 8), np.uint8)})  # of three dimensions
        with pytest.raises(DataError, match=r"holds images \(7, 8, 8, 8\) uint8"):
            data.medmnist("small", tmp_path)


class TestPoseNet:
    def test_it_learns(self, figures):
        torch.manual_seed(0)
        net = PoseNet(figures.shape, 14, 13, width=4, depth=1)
        log = training.fit(net, figures, epochs=3, lr=0.01, optimizer="adam", batch_size=8)
        assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]

    def test_separable_kernels_compute_less_with_the_same_maps(self):
        nets = [PoseNet((1, 32, 32), 3, 2, separable=s) for s in (False, True)]
        whole, less = (shapes.macs(net, (1, 32, 32))["macs"].sum() for net in nets)
        assert less < 0.4 * whole
        assert {tuple(net(torch.zeros(1, 1, 32, 32)).shape) for net in nets} == {(1, 7, 8, 8)}

    @pytest.mark.parametrize("separable", [False, True])
    def test_filters_can_be_cut_out_of_each_part(self, separable):
        torch.manual_seed(0)
        net = PoseNet((1, 32, 32), 3, 2, width=4, separable=separable).eval()
        kind = "point" if separable else "conv4"
        layers = [n for n in shapes.prunable(net) if n.startswith("backbone") and kind in n]
        attach_masks(net, recipes.one_shot(net, {name: pruning.Filter(0.5) for name in layers}))
        x = torch.randn(2, 1, 32, 32)
        small = channels.compact(net, x)
        torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())

    @pytest.mark.parametrize(("shape", "depth"), [((1, 30, 32), 1), ((1, 32, 32), 0)])
    def test_what_is_refused(self, shape, depth):
        with pytest.raises(ModelError):
            PoseNet(shape, 3, 2, depth=depth)
